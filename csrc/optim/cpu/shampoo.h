// The pieces of Shampoo on the CPU: 4-bit codes of matrices (layout and code book: params.h).
#pragma once
#include "common/isa.h"
#include "optim/cpu/codec.h"
#include "optim/params.h"

namespace tilewise {
namespace {

// ---- codes ----
constexpr int kRowVectors = kRowBlock / W;  // vectors in a block
using RowBlockValues = VF[kRowVectors];
typedef uint16_t VHalves __attribute__((vector_size(W * 2), aligned(2), may_alias));

struct SquareEntries {
  float value[16];  // by code
};
constexpr SquareEntries square_entries() {
  SquareEntries e = {};
  for (int i = 0; i < 9; i++) e.value[7 + i] = kSquares.value[i];
  for (int i = 2; i < 9; i++) e.value[8 - i] = -kSquares.value[i];
  return e;
}
constexpr SquareEntries kSquareEntries = square_entries();

// The largest float <= midpoint * scale; the product of two floats is exact in double.
TILEWISE_INLINE float threshold(float midpoint, float scale) {
  const double exact = double(midpoint) * scale;
  const float f = float(exact);
  return f > exact ? bits_to_float(float_to_bits(f) - 1) : f;
}

TILEWISE_INLINE VHalves& halves_at(uint8_t* codes, int part) {
  return reinterpret_cast<VHalves*>(codes)[part];
}

// Vector i holds elements 16 run + lane of part i % kParts; its codes stand in bits 4 run.
inline void encode_row_block(const RowBlockValues& x, float scale, uint8_t* codes) {
  float above[8];
  for (int i = 0; i < 8; i++) above[i] = threshold(kSquares.midpoint[i], scale);
  const VF first = set1(above[0]), first_negative = set1(threshold(kNegativeMidpoint, scale));
  VU words[kParts] = {};
#pragma GCC unroll 16
  for (int i = 0; i < kRowVectors; i++) {
    const VF a = abs(x[i]);
    const VI sign = (VI)x[i] >> 31;
    VI magnitude = -(a > select(sign, first_negative, first)) - (~sign & (a > set1(above[1])));
#pragma GCC unroll 8
    for (int k = 2; k < 8; k++) magnitude -= a > set1(above[k]);
    const VI code = (magnitude ^ sign) - sign + 7;
    words[i % kParts] |= (VU)code << (4 * (i / kParts));
  }
  for (int part = 0; part < kParts; part++) halves_at(codes, part) = __builtin_convertvector(words[part], VHalves);
}

inline void decode_row_block(const uint8_t* codes, float scale, RowBlockValues& x) {
  VU words[kParts];
  for (int part = 0; part < kParts; part++)
    words[part] = __builtin_convertvector(halves_at(const_cast<uint8_t*>(codes), part), VU);
#if defined(__AVX2__)
  const Table table = scaled_table(kSquareEntries.value, scale);
#endif
#pragma GCC unroll 16
  for (int i = 0; i < kRowVectors; i++) {
    const VU index = words[i % kParts] >> (4 * (i / kParts)) & 15;
#if defined(__AVX2__)
    x[i] = look_up(table, index);
#else
    for (int lane = 0; lane < W; lane++) x[i][lane] = kSquareEntries.value[index[lane]] * scale;
#endif
  }
}

// Calls body(row, first column, block) for every block of every row.
template <class Body>
void for_each_row_block(const MatrixCodecParams& p, const Runtime& rt, const Body& body) {
  const int64_t blocks = ceil_div(p.order, kRowBlock);
  parallel_for(rt, p.batch * p.order, max_of<int64_t>(1, 64 / blocks), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
      for (int64_t j = 0; j < blocks; j++) body(row, j * kRowBlock, row * blocks + j);
  });
}

inline void quantize_row_block(const MatrixCodecParams& p, int64_t row, int64_t column, int64_t block) {
  const float* values = p.values + row * p.order + column;
  const int64_t on_diagonal = row % p.order - column;
  RowBlockValues x;
  VF top = set1(0);
  for (int i = 0; i < kRowVectors; i++) {
    const int64_t lanes = max_of<int64_t>(0, p.order - column - i * W);
    const VF value = lanes ? load(values + i * W, lanes) : set1(0);
    VI keep = (VI)(abs(value) < set1(kInfinity));
    if (p.diagonal) keep &= iota() + i * W != set1i(int32_t(on_diagonal));
    x[i] = select(keep, value, set1(0));
    top = max(top, abs(x[i]));
  }
  const float scale = max_of(reduce_max(top), kMinSignedScale);
  p.scales[block] = scale;
  encode_row_block(x, scale, p.codes + block * kRowBlockBytes);
  if (p.diagonal && on_diagonal >= 0 && on_diagonal < kRowBlock) p.diagonal[row] = values[on_diagonal];
}

inline void dequantize_row_block(const MatrixCodecParams& p, int64_t row, int64_t column, int64_t block) {
  float* values = p.values + row * p.order + column;
  const int64_t on_diagonal = row % p.order - column;
  RowBlockValues x;
  decode_row_block(p.codes + block * kRowBlockBytes, p.scales[block], x);
  for (int i = 0; i < kRowVectors && i * W < p.order - column; i++)
    store(values + i * W, x[i], min_of<int64_t>(W, p.order - column - i * W));
  if (p.diagonal && on_diagonal >= 0 && on_diagonal < kRowBlock) values[on_diagonal] = p.diagonal[row];
}

const char* quantize_matrix(const MatrixCodecParams& p, const Runtime& rt) {
  for_each_row_block(p, rt,
                     [&](int64_t row, int64_t column, int64_t block) { quantize_row_block(p, row, column, block); });
  return nullptr;
}

const char* dequantize_matrix(const MatrixCodecParams& p, const Runtime& rt) {
  for_each_row_block(p, rt,
                     [&](int64_t row, int64_t column, int64_t block) { dequantize_row_block(p, row, column, block); });
  return nullptr;
}

}  // namespace
}  // namespace tilewise
