// What every backend of the family receives. Plain C: the per-ISA objects include it too.
#pragma once
#include "common/runtime.h"

namespace tilewise::attention {

enum class Type : int { f32, f16, bf16 };

// Strides in elements of a [b, h, s, d] tensor; the head dimension is contiguous. Packed (varlen) tensors [t, h, d]
// use `head` and `row` only.
struct Strides {
  int64_t batch, head, row;
};

struct ForwardParams {
  const void* q;  // [b, hq, s, d]  | packed [tq, hq, d]
  const void* k;  // [b, hkv, sk, d] | packed [tk, hkv, d]
  const void* v;  // [b, hkv, sk, dv] | packed [tk, hkv, dv]
  void* out;      // [b, hq, s, dv]  | packed [tq, hq, dv]
  float* lse;  // [b, hq, s] contiguous | packed [hq, tq]; natural logarithm, -inf for a row with nothing to attend to
  Strides q_strides, k_strides, v_strides, out_strides;
  const int32_t* cu_seqlens_q;  // [b + 1], or null: not packed
  const int32_t* cu_seqlens_k;  // [b + 1], or null
  int batch, q_heads, kv_heads;
  int seq_q, seq_k;          // lengths; for packed tensors the longest sequence
  int64_t total_q, total_k;  // rows of the packed tensors
  int dim, v_dim;
  float scale;
  bool causal;  // bottom-right aligned: key j is seen by query i iff j <= i + (sk - s)
  Type type;
};

struct BackwardParams {
  ForwardParams forward;  // out and lse as the forward pass left them
  const void* dout;       // as out
  void *dq, *dk, *dv;     // as q, k, v
  Strides dout_strides, dq_strides, dk_strides, dv_strides;
  float* delta;  // workspace, as lse: rowsum(dout * out)
  bool deterministic;
};

// The family's kernels on one machine; null = not available there.
struct Kernels {
  KernelFn<ForwardParams> forward;
  KernelFn<BackwardParams> backward;
};

}  // namespace tilewise::attention
