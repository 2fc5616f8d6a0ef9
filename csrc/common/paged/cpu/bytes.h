// The rows of a page as signed bytes, for AMX tiles of integers: what words.h is for tiles of bf16. Each row comes in
// units of code bytes that are loaded together:
//   kVectors, units()       vectors of 64 bytes that a unit decodes to, units of a row
//   channel(step, byte)     of byte `byte` of the row's vector `step`; the last may lie beyond the row's channels
//   decode(row, unit, x)    the unit's vectors
#pragma once
#include "common/paged/cpu/words.h"

namespace tilewise::paged {
namespace {

constexpr int kBytes = 64;

template <class Source>
struct ByteRows {
  static constexpr bool kServed = false;  // other rows than those of CodeRows
};

template <int Bits>
struct ByteRows<CodeRows<Bits>> : CodeRows<Bits> {
  using Codes = CodeRows<Bits>;
  static constexpr bool kServed = true, kDecoded = Bits == 8;  // rows are their own bytes
  static constexpr int kVectors = Bits == 8 ? 1 : 2, kUnitBytes = kVectors * kBytes * Bits / 8;

  using Codes::Codes;
  int units() const { return int(ceil_div(this->code_bytes(), kUnitBytes)); }
  static int channel(int step, int byte) {
    const int place = step % kVectors * kBytes + byte, from = step / kVectors * kUnitBytes + place % kUnitBytes;
    return from / 16 * Codes::kGroup + place / kUnitBytes * 16 + from % 16;
  }

  // A product of bits with this matrix extends the sign of the code that begins at bit Bits * v of each byte.
  static constexpr uint64_t extend_code(int v) {
    uint64_t matrix = 0;
    for (int i = 0; i < 8; i++) matrix |= uint64_t(1) << (Bits * v + min_of(i, Bits - 1)) << 8 * (7 - i);
    return matrix;
  }
  TILEWISE_INLINE void decode(const char* row, int unit, __m512i (&x)[kVectors]) const {
    const int first = unit * kUnitBytes, left = this->code_bytes() - first;
    if constexpr (Bits == 2) {
      const __m512i both = _mm512_broadcast_i64x4(load_32_bytes(row + first, left));
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) {
        constexpr auto m = extend_code;
        const long long a = m(2 * v), b = m(2 * v + 1);
        x[v] = _mm512_gf2p8affine_epi64_epi8(both, _mm512_setr_epi64(a, a, a, a, b, b, b, b), 0);
      }
    } else {
      const __m512i bytes = load_64_bytes(row + first, left);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; v++)
        x[v] = Bits == 8 ? bytes : _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64(extend_code(v)), 0);
    }
  }
};

}  // namespace
}  // namespace tilewise::paged
