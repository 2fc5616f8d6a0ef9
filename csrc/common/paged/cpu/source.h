// What the rows of a page hold. A source hands out a row in units of kVectors vectors, each of W channels:
//   kItem                        bytes of an element, in which strides count
//   kScaled                      a row's values are scale * code + zero; load_unit gives the codes, `pair` the rest
//   kVectors, units()            vectors of a unit, units of a row; the last may reach beyond the row's channels
//   channel(unit, vector)        the first of the vector's channels
//   load_unit(row, unit, x)
//   serves_few()                 whole units can be loaded
//   widen(to, row)               the row's values as floats
#pragma once
#include "common/isa.h"
#include "common/paged/params.h"

namespace tilewise::paged {
namespace {

template <class T>
struct FloatRows {
  static constexpr int kItem = sizeof(T), kVectors = 1;
  static constexpr bool kScaled = false;
  int dim;

  explicit FloatRows(int dim) : dim(dim) {}
  int units() const { return int(ceil_div(dim, W)); }
  bool serves_few() const { return dim % W == 0; }
  int bytes() const { return dim * kItem; }
  static int channel(int unit, int) { return unit * W; }
  TILEWISE_INLINE void load_unit(const char* row, int unit, VF (&x)[1]) const {
    x[0] = load(reinterpret_cast<const T*>(row) + unit * W);
  }
  void widen(float* to, const char* row) const {
    const T* from = reinterpret_cast<const T*>(row);
    int d = 0;
    for (; d + W <= dim; d += W) store(to + d, load(from + d));
    if (d < dim) store(to + d, load(from + d, dim - d), dim - d);
  }
};

// W bytes as integers: the low byte of each lane.
TILEWISE_INLINE VI load_bytes(const char* p) {
#if defined(__AVX512F__)
  return (VI)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (VI)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  const auto* bytes = reinterpret_cast<const int8_t*>(p);
  return VI{bytes[0], bytes[1], bytes[2], bytes[3]};
#endif
}

// The low Bits bits of each lane as a number in two's complement; what stands above them is ignored, but above 8 bits
// it is their sign.
template <int Bits>
TILEWISE_INLINE VF code_value(VI x) {
  constexpr int kHalf = 1 << (Bits - 1);
  if constexpr (Bits == 8) return __builtin_convertvector(x, VF);
#if defined(__AVX512F__)
  if constexpr (Bits <= 4) {  // the permutation reads four bits of its index
    VF table;
    for (int i = 0; i < W; i++) table[i] = float(((i & (2 * kHalf - 1)) ^ kHalf) - kHalf);
    return (VF)_mm512_permutexvar_ps((__m512i)x, (__m512)table);
  }
#endif
  return __builtin_convertvector(((x & (2 * kHalf - 1)) ^ kHalf) - kHalf, VF);
}

// Codes of Bits bits, in two's complement: byte j of a group of 16 holds channels j, 16 + j, ... of the group's, from
// its lowest bits on.
template <int Bits>
struct CodeLayout {
  static constexpr int kItem = 1, kVectors = 8 / Bits, kGroup = 16 * kVectors;
  int dim;

  explicit CodeLayout(int dim) : dim(dim) {}
  int groups() const { return int(ceil_div(dim, kGroup)); }
  int code_bytes() const { return groups() * 16; }
  int units() const { return code_bytes() / W; }
  static bool serves_few() { return true; }
  static int channel(int unit, int vector) {
    const int byte = unit * W;
    return byte / 16 * kGroup + vector * 16 + byte % 16;
  }
};

// A bf16 pair behind the codes: the value of a code is scale * code + zero.
struct ScaleZero {
  static TILEWISE_INLINE VF scale(VI pair) { return (VF)(pair << 16); }
  static TILEWISE_INLINE VF zero(VI pair) { return (VF)(pair & int32_t(0xffff0000)); }
};

template <int Bits>
struct CodeRows : CodeLayout<Bits> {
  using Layout = CodeLayout<Bits>;
  static constexpr int kVectors = Layout::kVectors;
  static constexpr bool kScaled = true;

  using Layout::Layout;
  int bytes() const { return this->code_bytes() + 4; }
  TILEWISE_INLINE int32_t pair(const char* row) const {
    int32_t pair;
    __builtin_memcpy(&pair, row + this->code_bytes(), 4);
    return pair;
  }
  TILEWISE_INLINE void load_unit(const char* row, int unit, VF (&x)[kVectors]) const {
    VI bytes = load_bytes(row + unit * W);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) x[v] = code_value<Bits>(bytes >> (Bits * v));
  }
  void widen(float* to, const char* row) const {
    const VI both = set1i(pair(row));
    const VF scale = ScaleZero::scale(both), zero = ScaleZero::zero(both);
    for (int u = 0; u < this->units(); u++) {
      VF x[kVectors];
      load_unit(row, u, x);
      for (int v = 0; v < kVectors; v++)
        if (const int d = Layout::channel(u, v); d < this->dim) store(to + d, x[v] * scale + zero, this->dim - d);
    }
  }
};

// Block floating point: 4-bit mantissas, and behind all of them an exponent for each 32 channels.
struct Bfp12Rows : CodeLayout<4> {
  static constexpr bool kScaled = false;

  using CodeLayout<4>::CodeLayout;
  int bytes() const { return code_bytes() + groups(); }
  // Of a mantissa's lowest bit; 0 for exponent 0, not finite for 255.
  static TILEWISE_INLINE float scale(uint8_t exponent) { return bits_to_float(uint32_t(exponent) << 23) * 0.125f; }
  TILEWISE_INLINE void load_unit(const char* row, int unit, VF (&x)[2]) const {
    const VI bytes = load_bytes(row + unit * W);
    const VF factor = set1(scale(uint8_t(row[code_bytes() + unit * W / 16])));
    x[0] = code_value<4>(bytes) * factor;
    x[1] = code_value<4>(bytes >> 4) * factor;
  }
  void widen(float* to, const char* row) const {
    for (int u = 0; u < units(); u++) {
      VF x[2];
      load_unit(row, u, x);
      for (int v = 0; v < 2; v++)
        if (const int d = channel(u, v); d < dim) store(to + d, x[v], dim - d);
    }
  }
};

}  // namespace
}  // namespace tilewise::paged
