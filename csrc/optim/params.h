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

// ---- one step of many tensors ----

// The tensors of a step are cut into chunks of so many elements, numbered through: the unit of work. It is a multiple
// of every block.
constexpr int kChunk = 8192;

// How an update uses the moments; rmsprop and adagrad are both `rms` (formulas: tilewise/optim.h).
enum class Rule : uint8_t { adam, rms, momentum, lion };
enum class Format : uint8_t { none, f32, bits8, bits4, rank1, factored };

struct Moment {
  void* values;   // f32 [n], codes, or null
  float* scales;  // of blocks, or of rows and columns, or null
  Format format;
};

// What differs between tensors: their step counts may.
struct TensorConstants {
  float step_size;        // lr, with adam's first bias correction or adagrad's decay
  float inv_correction2;  // 1 / sqrt(1 - beta2^t)
  float decay;            // 1 - lr * weight_decay where decoupled, else 1
  float grad_weight;      // of g in the first moment
};

struct StepTensor {
  void* param;        // [n] param_type
  const void* grad;   // [n] grad_type
  int16_t* residual;  // [n] or null: float32 bits of the master = (bits of the bf16 param << 16) + residual
  Moment first, second;
  float* step;       // read (and incremented) only where StepParams::device says so
  float* workspace;  // rank1 and factored: workspace_floats(rows, columns)
  int64_t n, rows, columns;
  int64_t first_chunk;
  uint32_t stream;
  uint32_t step_number;  // this step's, from 1, for random numbers; not set where the device reads `step`
  TensorConstants k;
  Float param_type, grad_type;
};

// Scalars that only the device knows, and what it needs to compute TensorConstants from them.
struct DeviceScalars {
  bool steps;                                             // read StepTensor::step; increment it at the end
  const float *lr, *found_inf, *grad_scale;               // each may be null
  float lr_value;                                         // where lr is null
  float decoupled_decay, lr_decay, log_beta1, log_beta2;  // beta^t = exp(t log_beta)
  bool correct_bias;                                      // adam
  float first_grad_weight;                                // TensorConstants::grad_weight at the first step
};

struct StepParams {
  const StepTensor* tensors;  // [count], in host memory
  int64_t count;
  int64_t chunks;  // of all tensors
  Rule rule;
  float beta1, beta2;
  float grad_weight;    // of g in the first moment
  float square_weight;  // of g^2 in the second moment; lion: of g in the moment that is kept
  float l2;             // g = grad_factor * grad + l2 * p
  float grad_factor;
  float eps;
  bool nesterov, stochastic_rounding, structured;  // structured: some second moment is rank1 or factored
  uint32_t seed;
  DeviceScalars device;
};

// Statistics of rows and columns are partial sums (or maxima) of tiles of so many rows and columns, added in order:
// the same whatever the number of threads. [row_tiles, columns], then [column_tiles, rows], then the new scales
// [rows + columns] and 1 / mean(row).
constexpr int kTileRows = 256, kTileColumns = 1024;
constexpr int64_t workspace_floats(int64_t rows, int64_t columns) {
  const int64_t row_tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t column_tiles = (columns + kTileColumns - 1) / kTileColumns;
  return row_tiles * columns + column_tiles * rows + rows + columns + 1;
}

// Block-wise quantisation by itself: what a step does to its moments, and back.
struct CodecParams {
  float* values;   // [n]
  uint8_t* codes;  // [blocks, 64], or of 8 bits [blocks, 256]
  float* scales;   // [blocks], `scale_stride` apart
  int64_t n, scale_stride;
  bool is_signed;
  int bits;
};

// ---- Shampoo ----
// A quantised matrix keeps 4 bits per element and one float32 scale per 64 consecutive elements of a row. The codes of
// a block are 32 bytes: seen as 16 little-endian words of 16 bits, bits 4i of word j hold element 16i + j (i = 0..3, j
// = 0..15). So one shift of 16 words gives 16 consecutive elements in the lanes of a CPU vector, and 8 bytes give a
// CUDA thread 4 runs of 4. The last block of a row is whole; its codes beyond the row's end are those of zero.
constexpr int kRowBlock = 64;
constexpr int kRowBlockBytes = 32;

// Linear-2: code c stands for sign(t) t^2 / 225 with t = 2c - 15, but code 7 for zero; on the grid of the book above.
// Code 7 + i stands for magnitude i, code 8 - i for its negative; minus magnitude 1 is missing.
constexpr Magnitudes make_squares() {
  Magnitudes m = {};
  for (int i = 1; i < 9; i++) m.value[i] = on_grid((2 * i - 1) * (2 * i - 1) / 225.0);
  for (int i = 0; i < 8; i++) m.midpoint[i] = (m.value[i] + m.value[i + 1]) / 2;
  return m;
}
constexpr Magnitudes kSquares = make_squares();
constexpr float kNegativeMidpoint = kSquares.value[2] / 2;  // between zero and the smallest negative value

struct MatrixCodecParams {
  float* values;    // [batch, order, order]
  uint8_t* codes;   // [batch, order, blocks of a row, 32]
  float* scales;    // [batch, order, blocks of a row]
  float* diagonal;  // [batch, order], kept apart and zero among the codes; null: it is like the rest
  int64_t batch, order;
};

struct OrthonormalizeParams {
  const float* rows;  // [batch, order, order]
  float* defect;      // [batch, order, order] workspace: I - rows rows^T
  float* out;         // [batch, order, order]: rows + 0.5 defect rows
  int64_t batch, order;
};

// The family's kernels on one machine; null = not available there.
struct Kernels {
  KernelFn<StepParams> step;
  KernelFn<CodecParams> quantize;
  KernelFn<CodecParams> dequantize;
  KernelFn<MatrixCodecParams> quantize_matrix;
  KernelFn<MatrixCodecParams> dequantize_matrix;
  KernelFn<OrthonormalizeParams> orthonormalize;
};

}  // namespace tilewise::optim
