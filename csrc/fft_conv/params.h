// What every backend of the family receives. Plain C: the per-ISA objects include it too.
#pragma once
#include "common/runtime.h"

namespace tilewise::fft_conv {

enum class Type : int { f32, f16, bf16 };

// Strides in elements of a [b, h, l] tensor; the length dimension is contiguous.
struct Strides {
  int64_t batch, head;
};

// y = postgate * (k conv (pregate * u) + skip * (pregate * u)); causal, or circular with period `length`.
struct ForwardParams {
  const void* u;         // [b, h, l]
  const void* pregate;   // [b, h, l] or null
  const void* postgate;  // [b, h, l] or null
  void* y;               // [b, h, l]
  const float* k;        // [h, filter_length], rows `k_stride` apart
  const float* skip;     // [h] or null
  Strides u_strides, pregate_strides, postgate_strides, y_strides;
  int64_t k_stride;
  int64_t batch, heads, length, filter_length;
  bool causal;
  Type type;  // of u, the gates and y
  // CPU only: the transform of at least `length` points for vectors of `lanes` floats; null when memory is exhausted.
  const struct Plan* (*plan)(int64_t length, int lanes);
  void* workspace;  // workspace_bytes(params), 256-byte aligned device memory; null where that is 0
};

struct BackwardParams {
  ForwardParams forward;  // y is not read
  const void* dy;         // [b, h, l]
  void* du;               // [b, h, l] or null
  void* dpregate;         // [b, h, l] or null
  void* dpostgate;        // [b, h, l] or null
  float* dk;              // [h, filter_length] contiguous, or null
  float* dskip;           // [h] or null
  Strides dy_strides, du_strides, dpregate_strides, dpostgate_strides;
};

// The family's kernels on one machine; null = not available there.
struct Kernels {
  KernelFn<ForwardParams> forward;
  KernelFn<BackwardParams> backward;
  int64_t (*forward_workspace)(const ForwardParams&);    // bytes; reads sizes and types only
  int64_t (*backward_workspace)(const BackwardParams&);  // bytes
  // Null where this machine serves the call, else the limit that it exceeds ("length above 16384"): the caller raises
  // NotImplementedError. Reads sizes and types only. A null function serves everything.
  const char* (*unsupported)(const ForwardParams&);
};

}  // namespace tilewise::fft_conv
