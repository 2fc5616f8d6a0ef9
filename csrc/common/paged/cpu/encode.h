// Floats to the rows of a page: the inverse of source.h. encode(row, x) writes the whole row of one token and head.
#pragma once
#include "common/paged/cpu/source.h"

namespace tilewise::paged {
namespace {

template <class T>
void encode(const FloatRows<T>& rows, char* row, const float* x) {
  T* to = reinterpret_cast<T*>(row);
  for (int d = 0; d < rows.dim; d += W) store(to + d, load(x + d, rows.dim - d), rows.dim - d);
}

// The bits of the next bf16 above x >= 0.
inline uint32_t bf16_above(float x) {
  return (float_to_bits(x) + 0xffff) & 0xffff0000;
}

// Puts the codes of channels into their bits.
template <class Layout>
void pack_codes(const Layout& layout, char* row, const uint8_t* codes) {
  constexpr int kBits = 8 / Layout::kVectors;
  for (int g = 0; g < layout.groups(); g++, codes += Layout::kGroup, row += 16)
    for (int j = 0; j < 16; j++) {
      unsigned byte = 0;
      for (int v = 0; v < Layout::kVectors; v++) byte |= unsigned(codes[v * 16 + j]) << (kBits * v);
      row[j] = char(byte);
    }
}

// x = scale * code + zero, asymmetric: the grid spans the row's values, and each gets the nearest code. A row that is
// not finite becomes NaN.
template <int Bits>
void encode(const CodeRows<Bits>& rows, char* row, const float* x) {
  constexpr float kLeast = -(1 << (Bits - 1)), kMost = -kLeast - 1;
  const int dim = rows.dim;
  float low = x[0], high = x[0], sum = 0;
  for (int d = 0; d < dim; d++) {
    low = min_of(low, x[d]);
    high = max_of(high, x[d]);
    sum += x[d] * 0;
  }
  const float share = -kLeast / (kMost - kLeast);  // of the range that lies below code 0
  uint32_t zero_bits = uint32_t(from_float<Bf16>(low * (1 - share) + high * share).bits) << 16;
  const float zero = bits_to_float(zero_bits);
  uint32_t scale_bits = bf16_above(max_of(max_of((low - zero) / kLeast, (high - zero) / kMost), 0.f));
  const float scale = bits_to_float(scale_bits);
  const bool finite = sum == 0 && scale < kInfinity && zero - zero == 0;
  if (!finite) zero_bits = 0x7fc00000, scale_bits = 0;
  uint8_t codes[2 * kMaxHeadDim] = {};
  if (finite && scale > 0)
    for (int d = 0; d < dim; d++) {
      const float nearest = ((x[d] - zero) / scale + 12582912.f) - 12582912.f;
      codes[d] = uint8_t(int(min_of(max_of(nearest, kLeast), kMost)) & ((1 << Bits) - 1));
    }
  pack_codes(rows, row, codes);
  const uint32_t pair = scale_bits >> 16 | zero_bits;
  __builtin_memcpy(row + rows.code_bytes(), &pair, 4);
}

// A block's exponent leaves the largest value at least half of the range of mantissas; nearest, ties to even.
inline void encode(const Bfp12Rows& rows, char* row, const float* x) {
  constexpr int kBlock = Bfp12Rows::kGroup;
  uint8_t codes[kMaxHeadDim + kBlock] = {};
  for (int first = 0; first < rows.dim; first += kBlock) {
    const int end = min_of(first + kBlock, rows.dim);
    uint32_t largest = 0;
    for (int d = first; d < end; d++) largest = max_of(largest, float_to_bits(x[d]) & 0x7fffffff);
    const uint32_t magnitude = largest >> 23;
    const uint8_t exponent = magnitude == 255 ? 255 : magnitude < 4 ? 0 : uint8_t(min_of<uint32_t>(magnitude + 1, 254));
    row[rows.code_bytes() + first / kBlock] = char(exponent);
    if (exponent == 0 || exponent == 255) continue;  // zeros; NaN
    const float inverse = 1 / Bfp12Rows::scale(exponent);
    for (int d = first; d < end; d++) {
      const float nearest = (x[d] * inverse + 12582912.f) - 12582912.f;
      codes[d] = uint8_t(int(min_of(max_of(nearest, -8.f), 7.f)) & 15);
    }
  }
  pack_codes(rows, row, codes);
}

}  // namespace
}  // namespace tilewise::paged
