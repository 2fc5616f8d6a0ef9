// Scaled dot-product attention. B batch, Hq query heads, Hkv key/value heads (Hq a multiple of Hkv), S queries, Sk
// keys, D head dim, Dv that of v, T packed tokens.
//
//   out = softmax(scale * q k^T) v      lse = log(sum(exp(scale * q k^T)))
//
// Causal attention is bottom-right aligned: query i sees keys up to i + Sk - S. A query that sees no key gets out 0 and
// lse -inf. Elements are f32, f16 or bf16, arithmetic is in f32; any strides whose last dimension is contiguous.
#pragma once
#include <optional>

#include "tilewise/tensor.h"

namespace tilewise {

struct AttentionOptions {
  bool causal = false;
  std::optional<double> scale;  // default: 1 / sqrt(D)
  bool deterministic = false;   // backward: the same bits in every run, also where atomics would be faster
};

// q [B, Hq, S, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv] -> out [B, Hq, S, Dv], lse f32 [B, Hq, S] contiguous.
void attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                       const AttentionOptions& options = {}, void* stream = nullptr);

// Gradients of sum(out * dout): dq, dk, dv as q, k, v. `delta` is a workspace, f32 as lse.
void attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                        const Tensor& lse, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& delta,
                        const AttentionOptions& options = {}, void* stream = nullptr);

// Packed sequences: sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1]. The longest lengths may be left open: then
// they are read from cu_seqlens on CPU, and bounded by the number of tokens elsewhere.
struct PackedSequences {
  const Tensor& cu_seqlens_q;  // i32 [B + 1]
  const Tensor& cu_seqlens_k;  // i32 [B + 1]
  std::optional<int64_t> max_seqlen_q, max_seqlen_k;
};

// q [Tq, Hq, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv] -> out [Tq, Hq, Dv], lse f32 [Hq, Tq] contiguous.
void attention_varlen_forward(const Tensor& q, const Tensor& k, const Tensor& v, const PackedSequences& sequences,
                              const Tensor& out, const Tensor& lse, const AttentionOptions& options = {},
                              void* stream = nullptr);

// As attention_backward.
void attention_varlen_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                               const PackedSequences& sequences, const Tensor& out, const Tensor& lse, const Tensor& dq,
                               const Tensor& dk, const Tensor& dv, const Tensor& delta,
                               const AttentionOptions& options = {}, void* stream = nullptr);

}  // namespace tilewise
