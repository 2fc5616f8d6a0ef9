// What every backend of the family receives. Plain C: the per-ISA objects include it too.
//
// A 4-bit state keeps one float32 scale per block of 128 consecutive (row-major) elements.
// The codes of a block are 64 bytes: seen as 16 little-endian words, bits 8k + 4h of word j hold element
// 64h + 16k + j (h = 0..1, k = 0..3, j = 0..15). So one shift of 16 words gives 16 consecutive elements in the lanes of
// a CPU vector, and 4 words (16 bytes) give a CUDA thread 8 runs of 4 consecutive elements. The last block of a tensor
// is whole; the codes beyond the tensor's end have no meaning.
#pragma once
#include "common/runtime.h"

namespace tilewise::optim {

constexpr int kBlock = 128;
constexpr int kCodeBytes = 64;
constexpr int kBlock8 = 256, kCodeBytes8 = 256;  // 8-bit states: a byte per element, in order (book8.h)

// The 4-bit code books. Signed (first moment): dynamic exponent, 4 bits. Its published decimals are rounded to
// multiples of 2^-23, which moves them by less than 6e-8 and makes the midpoint of any two neighbours a float: then the
// nearest code can be decided exactly in float arithmetic. Unsigned (second moment): ((i + 1) / 16)^4, linear in the
// fourth root: no zero, and down to 2^-16 of the block's largest, because the second moments of one block lie that far
// apart.
constexpr float on_grid(double x) {
  return static_cast<float>(static_cast<int>(x * 0x1p23 + 0.5) * 0x1p-23);
}
constexpr int kZeroCode = 7;  // signed: code 7 + i stands for magnitude i, code 7 - i for its negative; -1 is missing
struct Magnitudes {
  float value[9], midpoint[8];
};
constexpr Magnitudes make_magnitudes() {
  constexpr double published[9] = {0, .0055, .0325, .0775, .2125, .4375, .6625, .8875, 1};
  Magnitudes m = {};
  for (int i = 0; i < 9; i++) m.value[i] = on_grid(published[i]);
  for (int i = 0; i < 8; i++) m.midpoint[i] = (m.value[i] + m.value[i + 1]) / 2;
  return m;
}
constexpr Magnitudes kMagnitudes = make_magnitudes();
// In units of 2^-16, the unsigned codes are fourth powers j^4, j = 1..16. The midpoint of j^4 and (j + 1)^4 is
// (j^2 + j + 1)^2 - 1/2.
constexpr float kFourthPowerUnit = 0x1p-16f;

// Scales are floored, so that an all-zero block divides by nothing, and so that no intermediate of the exact rounding
// is subnormal.
constexpr float kMinSignedScale = 0x1p-78f, kMinUnsignedScale = 0x1p-86f;

enum class Float : uint8_t { f32, bf16, f16 };

struct AdamWTensor {
  void* param;       // [n] param_type
  const void* grad;  // [n] grad_type
  void* exp_avg;     // [blocks, 64] signed codes; with 32-bit states [n] f32
  void* exp_avg_sq;  // [blocks, 64] unsigned codes; with 32-bit states [n] f32
  float* scales;     // [blocks, 2] of exp_avg, exp_avg_sq; null with 32-bit states
  int64_t n;
  int64_t first_block;    // in the numbering of all tensors' blocks
  float step_size;        // lr / (1 - beta1^t)
  float inv_correction2;  // 1 / sqrt(1 - beta2^t)
  Float param_type, grad_type;
};

struct AdamWParams {
  const AdamWTensor* tensors;  // [count], in host memory
  int64_t count;
  int64_t blocks;  // of all tensors
  float beta1, beta2;
  float grad_weight;    // 1 - beta1, negated to maximise
  float square_weight;  // 1 - beta2
  float decay;          // 1 - lr * weight_decay
  float eps;
};

// Block-wise quantisation by itself: what a step does to its moments, and back.
struct CodecParams {
  float* values;   // [n]
  uint8_t* codes;  // [blocks, 64], or of 8 bits [blocks, 256]
  float* scales;   // [blocks], `scale_stride` apart
  int64_t n, scale_stride;
  bool is_signed;
  int bits;
};

// The family's kernels on one machine; null = not available there.
struct Kernels {
  KernelFn<AdamWParams> adamw_step;
  KernelFn<CodecParams> quantize;
  KernelFn<CodecParams> dequantize;
};

}  // namespace tilewise::optim
