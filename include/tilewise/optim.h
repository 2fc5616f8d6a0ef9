// Optimizers with quantised states.
//
// A 4-bit state keeps a float32 scale per block of 128 consecutive elements: B = ceil(n / 128) blocks of 64 bytes.
// csrc/optim/params.h gives the order of the codes and the code books. An 8-bit one has blocks of 256 elements, a byte
// each in their order; its code books (csrc/optim/book8.h) and scales are those of bitsandbytes.
#pragma once
#include <cstddef>

#include "tilewise/tensor.h"

namespace tilewise {

// One parameter of an AdamW step. All tensors are contiguous and on one device; param and grad may differ in dtype.
struct AdamWSlot {
  Tensor param;       // f32 | bf16 | f16, any shape of n elements
  Tensor grad;        // f32 | bf16 | f16, param's shape
  Tensor exp_avg;     // u8 [B, 64], or for 32-bit states f32 of param's shape
  Tensor exp_avg_sq;  // the same
  Tensor scales;      // f32 [B, 2], those of exp_avg and exp_avg_sq; empty for 32-bit states
  Tensor step;        // f32 scalar in host memory: steps taken so far; incremented
};

struct AdamWOptions {
  double lr = 1e-3, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 1e-2;
  bool maximize = false;
};

// With g the gradient (negated to maximise), t the step, and m, v the moments in float32 before they are quantised:
//   m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
//   p = p (1 - lr weight_decay) - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
// A NaN or infinite gradient element makes its parameter NaN, as in torch; in quantised states its moments restart
// from zero.
void adamw_step(const AdamWSlot* slots, size_t count, const AdamWOptions& options, void* stream = nullptr);

// Nearest code exactly; a tie goes to the code of smaller magnitude. Values that are not finite, and negative ones
// where is_signed is false, count as zero.
//   values f32 contiguous, n elements; bits 4 or 8; scales f32 [B], any stride
//   codes u8 [B, 64], B = ceil(n / 128), for 4 bits; u8 [B, 256], B = ceil(n / 256), for 8
void quantize_state(const Tensor& values, const Tensor& codes, const Tensor& scales, bool is_signed, int bits = 4,
                    void* stream = nullptr);
void dequantize_state(const Tensor& codes, const Tensor& scales, const Tensor& values, bool is_signed, int bits = 4,
                      void* stream = nullptr);

}  // namespace tilewise
