// The rows of a page as bf16 words, in which every value of theirs is exact: what source.h is for vectors of floats,
// for AMX tiles. A row comes in units of a few words' vectors that are loaded together and decoded one by one:
//   kVectors, units()          vectors of 32 words that a unit decodes to, units of a row
//   channel(step, word)        of word `word` of the row's vector `step`; the last may lie beyond the row's channels
//   load_unit(row, unit, x)    before decoding: words stay where they are
//   decode(x, v)               vector v of the unit
#pragma once
#include "common/paged/cpu/source.h"
#include "common/tiles.h"

namespace tilewise::paged {
namespace {

constexpr int kWords = 32;

typedef uint16_t HalfWords __attribute__((vector_size(64)));

// The first n of 64 or 32 bytes, the others zero.
TILEWISE_INLINE __m512i load_64_bytes(const char* from, int n) {
  return _mm512_maskz_loadu_epi8(n >= 64 ? ~uint64_t(0) : (uint64_t(1) << n) - 1, from);
}
TILEWISE_INLINE __m256i load_32_bytes(const char* from, int n) {
  return _mm256_maskz_loadu_epi8(n >= 32 ? ~uint32_t(0) : (uint32_t(1) << n) - 1, from);
}

template <class Source>
struct WordRows;

template <>
struct WordRows<FloatRows<Bf16>> : FloatRows<Bf16> {
  static constexpr int kVectors = 1, kHalves = 1;
  static constexpr bool kDecoded = true;  // rows are their own words

  using FloatRows<Bf16>::FloatRows;
  int units() const { return int(ceil_div(dim, kWords)); }
  static int channel(int step, int word) { return step * kWords + word; }
  TILEWISE_INLINE void load_unit(const char* row, int unit, Halves (&x)[1]) const {
    x[0] = load_64_bytes(row + unit * 64, bytes() - unit * 64);
  }
  TILEWISE_INLINE Halves decode(const Halves (&x)[1], int) const { return x[0]; }
};

// Words hold one byte of 8- or 2-bit codes, or two of 4-bit codes, as they stand in memory.
template <int Bits, class Source>
struct CodeWords : Source {
  static constexpr int kWordBytes = Bits == 4 ? 2 : 1, kVectors = 8 * kWordBytes / Bits, kUnitBytes = 32 * kWordBytes;
  static constexpr int kHalves = 1;
  static constexpr bool kDecoded = false;

  using Source::Source;
  int units() const { return int(ceil_div(this->code_bytes(), kUnitBytes)); }
  static int channel(int step, int word) {
    const int bit = step % kVectors * Bits, byte = (step / kVectors * kWords + word) * kWordBytes + bit / 8;
    return byte / 16 * Source::kGroup + bit % 8 / Bits * 16 + byte % 16;
  }
  TILEWISE_INLINE void load_unit(const char* row, int unit, Halves (&x)[1]) const {
    const int first = unit * kUnitBytes, left = this->code_bytes() - first;
    if constexpr (Bits == 4)
      x[0] = load_64_bytes(row + first, left);
    else if constexpr (Bits == 2)
      x[0] = _mm512_cvtepu8_epi16(load_32_bytes(row + first, left));
    else
      x[0] = _mm512_cvtepi8_epi16(load_32_bytes(row + first, left));
  }
  // By a table of bf16; the permutation reads five bits of its index. 8-bit codes are converted.
  TILEWISE_INLINE Halves decode(const Halves (&x)[1], int v) const {
    if constexpr (Bits == 8) {
      const VI even = (VI)x[0] << 16 >> 16, odd = (VI)x[0] >> 16;
      return pair_high(__builtin_convertvector(even, VF), __builtin_convertvector(odd, VF));
    }
    constexpr int kHalf = 1 << (Bits - 1);
    HalfWords table;
    for (int i = 0; i < kWords; i++)
      table[i] = uint16_t(float_to_bits(float(((i & (2 * kHalf - 1)) ^ kHalf) - kHalf)) >> 16);
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(x[0], Bits * v), (Halves)table);
  }
};

template <int Bits>
struct WordRows<CodeRows<Bits>> : CodeWords<Bits, CodeRows<Bits>> {
  using CodeWords<Bits, CodeRows<Bits>>::CodeWords;
};

// Beside the codes stands what their block's exponent adds to those of the mantissas.
template <>
struct WordRows<Bfp12Rows> : CodeWords<4, Bfp12Rows> {
  using Codes = CodeWords<4, Bfp12Rows>;
  static constexpr int kHalves = 2;

  using Codes::Codes;
  TILEWISE_INLINE void load_unit(const char* row, int unit, Halves (&x)[2]) const {
    // kOne: of mantissas as they are. kLeast: with smaller ones the sum would wrap; less than 2^-123 counts as zero.
    constexpr int kOne = 127 + 3, kLeast = 4, kNotFinite = 0xffc0 - 0xbf80;  // the last: from -1 to NaN
    Halves codes[1];
    Codes::load_unit(row, unit, codes);
    const int blocks = min_of(groups() - unit * 4, 4);  // of the unit; a block's codes are a 128-bit lane
    const __m128i bytes = _mm_maskz_loadu_epi8(__mmask16((1u << blocks) - 1), row + code_bytes() + unit * 4);
    VI by_lane;
    for (int i = 0; i < W; i++) by_lane[i] = int32_t(0x80008000u + i / 4 * 0x00010001u);
    const __m512i exponent = _mm512_shuffle_epi8(_mm512_broadcastd_epi32(bytes), (__m512i)by_lane);
    const __mmask32 bad = _mm512_cmpeq_epi16_mask(exponent, _mm512_set1_epi16(255));
    x[0] = _mm512_mask_set1_epi16(codes[0], bad, -1);
    x[0] = _mm512_mask_set1_epi16(x[0], _mm512_cmplt_epu16_mask(exponent, _mm512_set1_epi16(kLeast)), 0);
    x[1] = _mm512_slli_epi16(_mm512_sub_epi16(exponent, _mm512_set1_epi16(kOne)), 7);
    x[1] = _mm512_mask_set1_epi16(x[1], bad, kNotFinite);
  }
  TILEWISE_INLINE Halves decode(const Halves (&x)[2], int v) const {
    const Halves codes[1] = {x[0]}, mantissas = Codes::decode(codes, v);
    return _mm512_mask_add_epi16(mantissas, _mm512_test_epi16_mask(mantissas, mantissas), mantissas, x[1]);
  }
};

}  // namespace
}  // namespace tilewise::paged
