// Long convolution through the FFT. B batch, H heads (channels), L length, K filter length (K <= L).
//
//   y = postgate * (k conv x + skip * x),  x = pregate * u
//
// for every row (b, h); conv is causal, y[l] = sum_{j <= l} k[j] x[l - j], or circular with period L. Any L and K; rows
// are independent, so a NaN stays in its row. u, the gates and y share one dtype (f32, f16, bf16); all arithmetic and
// the filter are f32.
#pragma once
#include "tilewise/tensor.h"

namespace tilewise {

struct FftConvInputs {
  Tensor u;                          // f32|f16|bf16[B, H, L], last dimension contiguous
  Tensor k;                          // f32[H, K], last dimension contiguous
  const Tensor* pregate = nullptr;   // as u
  const Tensor* postgate = nullptr;  // as u
  const Tensor* skip = nullptr;      // f32[H], contiguous
  bool causal = true;
  const Tensor* workspace = nullptr;  // u8, at least fft_conv_(forward|backward)_workspace() bytes, on u's device
};

// Gradients to compute; null: not wanted.
struct FftConvGradients {
  const Tensor* du = nullptr;         // [B, H, L]
  const Tensor* dk = nullptr;         // f32[H, K], contiguous, summed over the batch in a fixed order
  const Tensor* dpregate = nullptr;   // [B, H, L]; needs pregate
  const Tensor* dpostgate = nullptr;  // [B, H, L]; needs postgate
  const Tensor* dskip = nullptr;      // f32[H], contiguous; needs skip
};

void fft_conv_forward(const FftConvInputs& in, const Tensor& y, void* stream = nullptr);
void fft_conv_backward(const FftConvInputs& in, const Tensor& dy, const FftConvGradients& out, void* stream = nullptr);

// Bytes of device memory that the call needs; 0 on CPU. Shapes, dtypes and devices count, data is not read.
int64_t fft_conv_forward_workspace(const FftConvInputs& in);
int64_t fft_conv_backward_workspace(const FftConvInputs& in, const FftConvGradients& out);

}  // namespace tilewise
