// Half a block of 256 values to and from 8-bit codes (code books and what decides: book8.h). Rounding is to the nearest
// code exactly, a tie going to the code of smaller magnitude.
#pragma once
#include "optim/cpu/bins8.h"
#include "optim/cpu/codec.h"

namespace tilewise {
namespace {

// ---- eight floats to look up by the low three bits of an index ----
#if defined(__AVX512F__)
struct Table8 {
  __m512 entries;  // twice
};
TILEWISE_INLINE VF look_up(const Table8& t, VI index) {
  return (VF)_mm512_permutexvar_ps((__m512i)index, t.entries);
}
#elif defined(__AVX2__)
struct Table8 {
  __m256 entries;
};
TILEWISE_INLINE VF look_up(const Table8& t, VI index) {
  return (VF)_mm256_permutevar8x32_ps(t.entries, (__m256i)index);
}
#else
struct Table8 {
  float entries[8];
};
inline VF look_up(const Table8& t, VI index) {
  VF v;
  for (int lane = 0; lane < W; lane++) v[lane] = t.entries[index[lane] & 7];
  return v;
}
#endif

struct Floats8 {
  float value[16];  // twice eight
};
template <class Entry>
constexpr Floats8 column(const Entry (&entries)[8], float Entry::* member) {
  Floats8 f = {};
  for (int i = 0; i < 16; i++) f.value[i] = entries[i % 8].*member;
  return f;
}
struct Integers8 {
  int32_t value[8];
};
template <class Entry>
constexpr Integers8 column_plus(const Entry (&entries)[8], float Entry::* member, int more) {
  Integers8 n = {};
  for (int i = 0; i < 8; i++) n.value[i] = int32_t(entries[i].*member) + more;
  return n;
}
TILEWISE_INLINE Table8 table_of(const Floats8& f) {
  Table8 t;
  __builtin_memcpy(&t, &f, sizeof t);
  return t;
}
TILEWISE_INLINE Table8 scaled(Table8 t, float factor) {
#if defined(__AVX512F__)
  return {_mm512_mul_ps(t.entries, _mm512_set1_ps(factor))};
#elif defined(__AVX2__)
  return {_mm256_mul_ps(t.entries, _mm256_set1_ps(factor))};
#else
  for (float& entry : t.entries) entry *= factor;
  return t;
#endif
}

template <bool kSigned>
struct Book {
  static constexpr Book8 book = kSigned ? kSignedBook8 : kUnsignedBook8;
  static constexpr Floats8 factor = column(book.search, &SearchEntry::factor);
  static constexpr Floats8 offset = column(book.search, &SearchEntry::offset);
  static constexpr Floats8 last = column(book.search, &SearchEntry::last);
  static constexpr Floats8 border = column(book.search, &SearchEntry::border);
  static constexpr Floats8 value_offset = column(book.value, &ValueEntry::offset);
  static constexpr Floats8 unit = column(book.value, &ValueEntry::unit);
};

// ---- codes of a vector's elements, a byte each ----
TILEWISE_INLINE VF load_codes(const uint8_t* codes) {
#if defined(__AVX512F__)
  return (VF)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
#elif defined(__AVX2__)
  return (VF)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
#else
  return VF{float(codes[0]), float(codes[1]), float(codes[2]), float(codes[3])};
#endif
}

// Codes -1..255 (-1 saturates to 0) of four vectors.
TILEWISE_INLINE void store_codes(const VI (&c)[4], uint8_t* codes) {
#if defined(__AVX2__)
  const VI mixed = saturate_to_u8(saturate_to_u16(c[0], c[1]), saturate_to_u16(c[2], c[3]));
#if defined(__AVX512F__)  // 4 bytes of every vector in each 16
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(codes, _mm512_permutexvar_epi32(order, (__m512i)mixed));
#else
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm256_permutevar8x32_epi32((__m256i)mixed, order));
#endif
#else
  for (int i = 0; i < 4 * W; i++) codes[i] = uint8_t(max_of(c[i / W][i % W], 0));
#endif
}

// ---- decoding: the octave of the ordinal gives the decade ----
#if defined(__AVX512F__)
// Sixteen octaves tell zero from the rest, so that the octave of the bare ordinal n will do, as for n + 1/2. That of
// 256 n is the same modulo 8, and modulo 16 not that of 0.
template <bool kSigned>
constexpr Floats8 ordinal_offsets() {
  Floats8 f = column((kSigned ? kSignedBook8 : kUnsignedBook8).value, &ValueEntry::offset);
  for (float& offset : f.value) offset += 9;
  f.value[kSigned ? 0 : 7] = kSigned ? 0 : -18;  // of ordinal 0, of 1
  return f;
}

template <bool kSigned>
TILEWISE_INLINE void decode8(const uint8_t* codes, float factor, BlockValues& x) {
  static constexpr Floats8 kOffsets = ordinal_offsets<kSigned>();
  const Table8 offsets = table_of(kOffsets), units = scaled(table_of(Book<kSigned>::unit), factor);
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; i++) {
    const VF ordinal = load_codes(codes + i * W) * 256 + (kSigned ? -127 : 1) * 256.f;
    const VI octave = (VI)((VU)ordinal >> 23);
    VI offset = (VI)look_up(offsets, octave);
    if (kSigned) offset ^= (VI)ordinal & INT32_MIN;
    x[i] = (18 / 256.f * ordinal + (VF)offset) * look_up(units, octave);
  }
}
#else
#if defined(__AVX2__)
// Numerators are small integers: a sign that is an integer, and zero for zero, cost one instruction, and the octave of
// the bare ordinal n will do.
TILEWISE_INLINE void decode8_signed(const uint8_t* codes, float factor, BlockValues& x) {
  static constexpr auto kOffsets = column_plus(kSignedBook8.value, &ValueEntry::offset, 9);
  const __m256i offsets = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kOffsets.value));
  const Table8 units = scaled(table_of(Book<true>::unit), factor);
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; i++) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i * W));
    const __m256i n = _mm256_sub_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_set1_epi32(127));
    const __m256i octave = _mm256_srli_epi32((__m256i)_mm256_cvtepi32_ps(n), 23);
    const __m256i offset = _mm256_sign_epi32(_mm256_permutevar8x32_epi32(offsets, octave), n);
    const __m256i numerator = _mm256_add_epi32(_mm256_madd_epi16(n, _mm256_set1_epi32(18)), offset);
    x[i] = (VF)_mm256_cvtepi32_ps(numerator) * look_up(units, (VI)octave);
  }
}
#endif
template <bool kSigned>
TILEWISE_INLINE void decode8(const uint8_t* codes, float factor, BlockValues& x) {
#if defined(__AVX2__)
  if constexpr (kSigned) return decode8_signed(codes, factor, x);
#endif
  const Table8 offsets = table_of(Book<kSigned>::value_offset), units = scaled(table_of(Book<kSigned>::unit), factor);
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; i++) {
    const VF code = load_codes(codes + i * W), from_zero = code - 127;
    const VF half_up = kSigned ? abs(from_zero) + .5f : code + 1.5f;  // ordinal + 1/2
    const VI octave = (VI)((VU)half_up >> 23);
    const VF value = max(18 * half_up + look_up(offsets, octave), set1(0)) * look_up(units, octave);
    x[i] = kSigned ? (VF)((VI)value ^ ((VI)from_zero & INT32_MIN)) : value;
  }
}
#endif

// ---- encoding ----
// v + 1 where a * b > c * d in the reals; the two are nearly equal, or one is far above the other.
TILEWISE_INLINE VI count_above(VI v, VF a, VF b, VF c, VF d) {
#if defined(__AVX512F__)
  const __m512 product = (__m512)(a * b), rest = _mm512_fnmadd_ps((__m512)a, (__m512)b, product);
  const __mmask16 above = _mm512_cmp_ps_mask(_mm512_fnmadd_ps((__m512)c, (__m512)d, product), rest, _CMP_GT_OQ);
  return (VI)_mm512_mask_add_epi32((__m512i)v, above, (__m512i)v, _mm512_set1_epi32(1));
#elif defined(__AVX2__)
  const __m256 product = (__m256)(a * b), rest = _mm256_fnmadd_ps((__m256)a, (__m256)b, product);
  return v - (VI)_mm256_cmp_ps(_mm256_fnmadd_ps((__m256)c, (__m256)d, product), rest, _CMP_GT_OQ);
#else
  for (int lane = 0; lane < W; lane++) v[lane] += double(a[lane]) * b[lane] > double(c[lane]) * d[lane];
  return v;
#endif
}

// Codes from those of the magnitudes: mirrored about zero where x is negative.
TILEWISE_INLINE VI with_sign_of(VF x, VI codes) {
#if defined(__AVX512F__)
  const __mmask16 negative = _mm512_movepi32_mask((__m512i)x);
  return (VI)_mm512_mask_sub_epi32((__m512i)codes, negative, _mm512_set1_epi32(2 * 127), (__m512i)codes);
#else
  return select((VI)x < 0, 2 * 127 - codes, codes);
#endif
}

struct Scale8 {
  VF scale, inverse;  // in units of book.scale_factor

  TILEWISE_INLINE Scale8(float block_scale, const Book8& book)
      : scale(set1(block_scale * book.scale_factor)), inverse(set1(1 / (block_scale * book.scale_factor))) {}
};

// The codes of magnitudes.
template <bool kSigned>
TILEWISE_INLINE VI magnitude_codes(VF a, const Scale8& s) {
  using B = Book<kSigned>;
  constexpr Book8 book = B::book;
  constexpr float kPerClass = float(0x1p-23 / book.width), kStart = float(book.start / book.width);
  const VF y = min(a * s.inverse + book.least, set1(book.most));
  const VI index = __builtin_convertvector(__builtin_convertvector((VI)y, VF) * kPerClass - kStart, VI);
  // The ordinal below the nearest midpoint, roughly; where that may be wrong, x is at a value, far from midpoints.
  const VF factor = look_up(table_of(B::factor), index), offset = look_up(table_of(B::offset), index);
  const VF last = look_up(table_of(B::last), index);
  const VF biased = min((factor * a * s.inverse - offset) * (1.f / 9) + kRoundBias, last);
  const VF inner = (biased - kRoundBias) * 9 + offset;
  const VF midpoint = select(biased == last, look_up(table_of(B::border), index), inner);
  constexpr int kFirst = kRoundBiasBits - (book.zero_code - book.zero_ordinal);
  return count_above((VI)biased - kFirst, factor, a, midpoint, s.scale);
}

// The exact codes of four vectors.
template <bool kSigned>
TILEWISE_INLINE void encode_exactly(const VF (&x)[4], float block_scale, uint8_t* codes) {
  const Scale8 s(block_scale, Book<kSigned>::book);
  VI c[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    c[i] = magnitude_codes<kSigned>(kSigned ? abs(x[i]) : x[i], s);
    if (kSigned) c[i] = with_sign_of(x[i], c[i]);
  }
  store_codes(c, codes);
}

#if defined(__AVX2__)
// The exact codes where a rough position among them decides: everywhere but within kDoubt of a midpoint. Its error is
// at most .65 * 2^-14: half an ulp of scale's inverse, y, slope, offset and line each, with lines up to 256 (and an
// eighth of 2^-14 in fixed point). About one group of four vectors in 100 holds a doubtful value, and is encoded again.
constexpr float kDoubt = 0x1p-14;

template <bool kSigned>
__attribute__((noinline, cold)) void encode_again(VF a, VF b, VF c, VF d, float block_scale, uint8_t* codes) {
  encode_exactly<kSigned>({a, b, c, d}, block_scale, codes);
}
#endif

#if defined(__AVX512F__)

struct Table32 {
  __m512 low, high;
};
TILEWISE_INLINE Table32 table_of(const float (&entries)[32]) {
  return {_mm512_loadu_ps(entries), _mm512_loadu_ps(entries + 16)};
}
TILEWISE_INLINE VF look_up(const Table32& t, VI index) {
  return (VF)_mm512_permutex2var_ps(t.low, (__m512i)index, t.high);
}

// Four vectors of integers to bytes: signed ones from -128 to 127, unsigned ones from 0 to 255.
template <bool kSigned>
TILEWISE_INLINE __m512i to_bytes(const VI (&c)[4]) {
  const __m512i a = (__m512i)c[0], b = (__m512i)c[1], d = (__m512i)c[2], e = (__m512i)c[3];
  const __m512i mixed = kSigned ? _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(d, e))
                                : _mm512_packus_epi16(_mm512_packus_epi32(a, b), _mm512_packus_epi32(d, e));
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), mixed);
}

// The four vectors take every stage together: one chain after the other would fill the scheduler with what waits.
template <bool kSigned>
TILEWISE_INLINE void encode_four(const VF (&x)[4], float block_scale, VF inverse, uint8_t* codes) {
  static constexpr Bins8<32> bins = kSigned ? kSignedBins32 : kUnsignedBins32;
  VF y[4], position[4], distance[4];  // position: of the magnitude, 0 that of code zero_code
  VI bin[4], c[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) y[i] = (kSigned ? abs(x[i]) : x[i]) * inverse + bins.least;
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    bin[i] = (VI)(__builtin_convertvector((VI)y[i], VF) * bins.per_bit + (bins.start + kRoundBias));
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    position[i] = y[i] * look_up(table_of(bins.slope), bin[i]) + look_up(table_of(bins.offset), bin[i]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) position[i] = min(position[i], position[i] * .25f + look_up(table_of(bins.bend), bin[i]));
  // Signed ones are negated, so that the largest, 128, still fits a byte: the code is 127 minus that.
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    if (kSigned) position[i] = (VF)((VI)position[i] | (~(VI)x[i] & INT32_MIN));
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    distance[i] = (VF)_mm512_reduce_ps((__m512)position[i], _MM_FROUND_TO_NEAREST_INT);
    c[i] = (VI)_mm512_cvtps_epi32((__m512)position[i]);
  }
  __m512i bytes = to_bytes<kSigned>(c);
  if (kSigned) bytes = _mm512_xor_si512(bytes, _mm512_set1_epi8(127));
  _mm512_storeu_si512(codes, bytes);
  const VF furthest = absmax(absmax(distance[0], distance[1]), absmax(distance[2], distance[3]));
  if (__builtin_expect(_mm512_cmp_ps_mask((__m512)furthest, _mm512_set1_ps(.5f - kDoubt), _CMP_NLE_UQ), 0))
    encode_again<kSigned>(x[0], x[1], x[2], x[3], block_scale, codes);
}
#elif defined(__AVX2__)
template <int kBins>
TILEWISE_INLINE Table8 table_of(const float (&entries)[kBins]) {
  return {_mm256_loadu_ps(entries)};
}

// Positions in fixed point, of 16 bits each before and behind the point.
template <bool kSigned>
TILEWISE_INLINE __m256i fixed_position(VF x, VF inverse) {
  static constexpr Bins8<8> bins = kSigned ? kSignedBins8 : kUnsignedBins8;
  const VF y = (kSigned ? abs(x) : x) * inverse + bins.least;
  const VI bin = (VI)(__builtin_convertvector((VI)y, VF) * bins.per_bit + (bins.start + kRoundBias));
  const VF line = y * look_up(table_of(bins.slope), bin) + look_up(table_of(bins.offset), bin);
  const VF position = min(line, line * .25f + look_up(table_of(bins.bend), bin));
  const __m256i fixed = _mm256_cvtps_epi32((__m256)position);
  if (!kSigned) return fixed;
  return _mm256_add_epi32(_mm256_sign_epi32(fixed, (__m256i)x), _mm256_set1_epi32(int(127.5 * kFine)));
}

template <bool kSigned>
TILEWISE_INLINE void encode_four(const VF (&x)[4], float block_scale, VF inverse, uint8_t* codes) {
  const __m256i halves =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  __m256i whole[2], rest[2];  // of two vectors, by turns
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    const __m256i odd = fixed_position<kSigned>(x[2 * i + 1], inverse);
    const __m256i even = _mm256_shuffle_epi8(fixed_position<kSigned>(x[2 * i], inverse), halves);
    whole[i] = _mm256_blend_epi16(even, odd, 0xaa);
    rest[i] = _mm256_blend_epi16(odd, even, 0xaa);
  }
  const __m256i in_quads =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
  const __m256i bytes = _mm256_shuffle_epi8(_mm256_packus_epi16(whole[0], whole[1]), in_quads);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm256_permutevar8x32_epi32(bytes, order));
  // Codes change where the rest is zero. NaN and infinity arrive as INT_MIN, so as a doubt.
  const __m256i nearest = _mm256_min_epu16(_mm256_abs_epi16(rest[0]), _mm256_abs_epi16(rest[1]));
  const __m256i doubt = _mm256_subs_epu16(_mm256_set1_epi16(int(kDoubt * kFine) + 1), nearest);
  if (__builtin_expect(!_mm256_testz_si256(doubt, doubt), 0))
    encode_again<kSigned>(x[0], x[1], x[2], x[3], block_scale, codes);
}
#endif

// As Encoder4.
template <bool kSigned>
struct Encoder8 {
  float scale;
  uint8_t* to;
  VF four[4];

  TILEWISE_INLINE Encoder8(float scale, uint8_t* to) : scale(scale), to(to) {}
  TILEWISE_INLINE void put(int i, VF x) {
    four[i % 4] = x;
    if (i % 4 < 3) return;
    uint8_t* codes = to + (i - 3) * W;
#if defined(__AVX512F__)
    encode_four<kSigned>(four, scale, set1(1 / (scale * (kSigned ? kSignedBins32 : kUnsignedBins32).unit)), codes);
#elif defined(__AVX2__)
    encode_four<kSigned>(four, scale, set1(1 / (scale * (kSigned ? kSignedBins8 : kUnsignedBins8).unit)), codes);
#else
    encode_exactly<kSigned>(four, scale, codes);
#endif
  }
};

// As Codec4.
struct Codec8 {
  static constexpr int kBits = 8, kPieces = 2, kElements = kPieces * kBlock;
  static constexpr int kPieceBytes = kBlock, kBytes = kPieces * kPieceBytes;
  static constexpr float kMinSigned = kMinScale8, kMinUnsigned = kMinScale8;
  using SignedEncoder = Encoder8<true>;
  using UnsignedEncoder = Encoder8<false>;

  TILEWISE_INLINE static void decode_signed(const uint8_t* codes, float factor, BlockValues& x) {
    decode8<true>(codes, factor, x);
  }
  TILEWISE_INLINE static void decode_unsigned(const uint8_t* codes, float factor, BlockValues& x) {
    decode8<false>(codes, factor, x);
  }
};

}  // namespace
}  // namespace tilewise
