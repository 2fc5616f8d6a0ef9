// Optimizers with quantised states.
//
// A quantised moment keeps 4 or 8 bits per element and a float32 scale per block of 128 or 256 consecutive elements.
// csrc/optim/params.h gives the order of the codes and the code books; those of 8 bits (csrc/optim/book8.h) and
// their scales are those of bitsandbytes.
#pragma once
#include <cstddef>

#include "tilewise/tensor.h"

namespace tilewise {

// With g the gradient, m and v the first and second moment (float32, before they are quantised), t the step:
//   adam     m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
//            p -= lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
//   sgd      m = beta1 m + (1 - dampening) g, at the first step m = g;  p -= lr m, with nesterov lr (g + beta1 m),
//            with beta1 = 0 lr g
//   lion     p -= lr sign(beta1 m + (1 - beta1) g),  then m = beta2 m + (1 - beta2) g
//   rmsprop  v = beta2 v + (1 - beta2) g^2,  u = g / (sqrt(v) + eps);  p -= lr u, or with beta1 > 0
//            m = beta1 m + u,  p -= lr m
//   adagrad  v = v + g^2;  p -= lr / (1 + (t - 1) lr_decay) g / (sqrt(v) + eps)
// Before that, decoupled weight decay multiplies p by 1 - lr weight_decay; otherwise g += weight_decay p.
enum class OptimizerRule : uint8_t { adam, sgd, lion, rmsprop, adagrad };

// One parameter of a step, n elements. All tensors are contiguous and on one device. How a moment is held shows in its
// tensors; one that the rule does not keep has none (empty):
//   32 bits   f32 of param's shape, scales empty
//   8 bits    u8 [B, 256], scales f32 [B], B = ceil(n / 256)
//   4 bits    u8 [B, 64], scales f32 [B], B = ceil(n / 128)
// The second moment of a parameter seen as a matrix of `rows` rows and n / rows columns may also be
//   rank-1    u8 [B, 64] as for 4 bits, scales f32 [rows + columns]: the largest v of each row, then of each column;
//             the scale of an element is the smaller of its two
//   factored  empty, scales f32 [rows + columns]: moving averages of the mean g^2 of each row, then of each column;
//             v = row column / mean(row)
struct OptimizerSlot {
  Tensor param;  // f32 | bf16 | f16
  Tensor grad;   // f32 | bf16 | f16, param's shape
  Tensor first, first_scales;
  Tensor second, second_scales;
  Tensor residual;     // i16 of param's shape, or empty: what a bf16 param lacks of its float32 master
  Tensor step;         // f32 scalar: steps taken so far; incremented. In host memory unless capturable
  int64_t rows = 0;    // > 0: the second moment is rank-1 or factored
  int64_t stream = 0;  // tells the random numbers of one parameter from those of others
};

struct OptimizerOptions {
  OptimizerRule rule = OptimizerRule::adam;
  double lr = 1e-3, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 1e-2, dampening = 0, lr_decay = 0;
  bool decoupled_weight_decay = true, nesterov = false, maximize = false;
  bool stochastic_rounding = false;  // of bf16 and f16 params, from Philox with key (seed, stream)
  int64_t seed = 0;
  // Step counters are on the device and the bias corrections are computed there, so that a CUDA graph may be replayed.
  bool capturable = false;
  // f32 scalars on the params' device, or empty. The gradient is divided by grad_scale; where found_inf is not zero the
  // call changes nothing (on CUDA it needs `capturable`: the host cannot know). lr_tensor takes lr's place.
  Tensor lr_tensor, found_inf, grad_scale;
  Tensor workspace;  // f32, optimizer_workspace() elements
};

// How many floats of workspace the slots need: 0 without rank-1 or factored second moments.
int64_t optimizer_workspace(const OptimizerSlot* slots, size_t count);

// A NaN or infinite gradient element makes its parameter NaN or infinite, as in torch; in quantised states the moments
// of that element restart from zero, and no other element is touched by it.
void optimizer_step(const OptimizerSlot* slots, size_t count, const OptimizerOptions& options, void* stream = nullptr);

// Nearest code exactly; a tie goes to the code of smaller magnitude. Values that are not finite, and negative ones
// where is_signed is false, count as zero.
//   values f32 contiguous, n elements; bits 4 or 8; scales f32 [B], any stride
//   codes u8 [B, 64], B = ceil(n / 128), for 4 bits; u8 [B, 256], B = ceil(n / 256), for 8
void quantize_state(const Tensor& values, const Tensor& codes, const Tensor& scales, bool is_signed, int bits = 4,
                    void* stream = nullptr);
void dequantize_state(const Tensor& codes, const Tensor& scales, const Tensor& values, bool is_signed, int bits = 4,
                      void* stream = nullptr);

// ---- the pieces of Shampoo ----
// Batches of square matrices, all contiguous and on one device; C = ceil(n / 64) blocks of 64 consecutive elements in a
// row, each with a scale.

// Nearest value of the Linear-2 book exactly; a tie goes to the code of smaller magnitude. Values that are not finite
// count as zero. With `diagonal` the diagonals are kept there as they are, and only the rest is quantised.
//   values f32 [b, n, n]; codes u8 [b, n, 32 C], 16-byte aligned; scales f32 [b, n, C]; diagonal f32 [b, n] or null
void quantize_matrix(const Tensor& values, const Tensor& codes, const Tensor& scales, const Tensor* diagonal,
                     void* stream = nullptr);
void dequantize_matrix(const Tensor& codes, const Tensor& scales, const Tensor* diagonal, const Tensor& values,
                       void* stream = nullptr);

// One Bjorck step towards orthonormal rows: out = rows + 0.5 defect rows, defect = I - rows rows^T.
//   rows, defect (a workspace), out f32 [b, n, n]
void orthonormalize(const Tensor& rows, const Tensor& defect, const Tensor& out, void* stream = nullptr);

}  // namespace tilewise
