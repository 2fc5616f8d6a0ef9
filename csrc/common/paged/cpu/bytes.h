// The rows of a page as signed bytes, for AMX tiles of integers: what words.h is for tiles of bf16. Each row comes in
// units of code bytes that are loaded together:
//   kVectors, units()       vectors of 64 bytes that a unit decodes to, units of a row
//   channel(step, byte)     of byte `byte` of the row's vector `step`; the last may lie beyond the row's channels
//   whole(), code_mask(unit)        whether all units are the row's; what of one is
//   load_unit(row, unit, mask)      before decoding: bytes stay where they are, those of other rows are zero
//   decode(x, v)            vector v of the unit
//   decode_biased(x, v)     the same plus 128, unsigned
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
  static constexpr int kBits = Bits;
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
  bool whole() const { return this->code_bytes() % kUnitBytes == 0; }
  // In words of 8 bytes: finer masks cost an instruction.
  __mmask8 code_mask(int unit) const {
    return __mmask8((1u << max_of(0, min_of(kUnitBytes, this->code_bytes() - unit * kUnitBytes)) / 8) - 1);
  }
  template <bool Whole = false>
  static TILEWISE_INLINE __m512i load_unit(const char* row, int unit, __mmask8 mask) {
    row += unit * kUnitBytes;
    if constexpr (Bits == 2)
      return _mm512_broadcast_i64x4(Whole ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row))
                                          : _mm256_maskz_loadu_epi64(mask, row));
    return Whole ? _mm512_loadu_si512(row) : _mm512_maskz_loadu_epi64(mask, row);
  }
  static TILEWISE_INLINE __m512i decode(__m512i x, int v) { return Bits == 8 ? x : extend<0>(x, v); }
  static TILEWISE_INLINE __m512i decode_biased(__m512i x, int v) {
    return Bits == 8 ? _mm512_xor_si512(x, _mm512_set1_epi8(-128)) : extend<128>(x, v);
  }

 private:
  template <int Flip>
  static TILEWISE_INLINE __m512i extend(__m512i x, int v) {
    constexpr auto m = extend_code;
    const long long a = m(Bits == 2 ? 2 * v : v), b = m(Bits == 2 ? 2 * v + 1 : v);
    return _mm512_gf2p8affine_epi64_epi8(x, _mm512_setr_epi64(a, a, a, a, b, b, b, b), Flip);
  }
};

}  // namespace
}  // namespace tilewise::paged
