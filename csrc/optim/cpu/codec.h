// One block of 128 values to and from 4-bit codes (layout and code books: params.h). Rounding is to the nearest code
// exactly, a tie going to the code of smaller magnitude.
//
// The decisions compare with midpoint * scale rounded down to a float: x > midpoint * scale in the reals exactly when
// x > that product rounded down, because no float lies between the two.
#pragma once
#include "optim/cpu/block_values.h"

namespace tilewise {
namespace {

constexpr int kParts = 16 / W;  // vectors in a run of 16 elements, and in the 16 words of codes

// Where the codes of vector i stand in their words.
constexpr int shift_of(int i) {
  const int run = i / kParts;
  return 8 * (run & 3) + 4 * (run >> 2);
}

// (i + 1)^4 for code i, and the midpoint of codes i - 1 and i, in units of 2^-16 and exact; for floats and vectors.
template <class T>
TILEWISE_INLINE constexpr T fourth_power(T j) {
  return (j * j) * (j * j);
}
template <class T>
TILEWISE_INLINE constexpr T midpoint_of_fourth_powers(T j) {
  const T e = j * j + j + 1;
  return e * e - .5f;
}
// The bits of a float are its logarithm, roughly, so a quarter of them is that of its fourth root: the float with bits
// kRootBits + (bits(x) - bits(scale)) / 4 is about 16 (x / scale)^(1/4). Its logarithm errs by up to .0215 on the way
// in, whatever x and scale are, and on the way out by an amount that the result determines. With .0545 taken off (.0491
// to .0597 would do), the midpoint between codes b - 1 and b always comes out strictly between b and b + 1. So floor of
// that float is b or b - 1 for code b, and one exact comparison with midpoint floor decides.
constexpr int kRootBits = int((127 + 4 - .0545) * (1 << 23));

TILEWISE_INLINE VU load_words(const uint8_t* codes, int part) {
  return (VU)load(reinterpret_cast<const int32_t*>(codes) + part * W);
}

#if defined(__AVX2__)

// Sixteen floats to look up by the low four bits of an index.
#if defined(__AVX512F__)
struct Table {
  __m512 entries;
};
TILEWISE_INLINE Table scaled_table(const float* entries, float factor) {
  return {_mm512_mul_ps(_mm512_loadu_ps(entries), _mm512_set1_ps(factor))};
}
TILEWISE_INLINE VF look_up(const Table& t, VU index) {
  return (VF)_mm512_permutexvar_ps((__m512i)index, t.entries);
}
TILEWISE_INLINE VI saturate_to_u16(VI a, VI b) {
  return (VI)_mm512_packus_epi32((__m512i)a, (__m512i)b);
}
TILEWISE_INLINE VI saturate_to_u8(VI a, VI b) {
  return (VI)_mm512_packus_epi16((__m512i)a, (__m512i)b);
}
TILEWISE_INLINE VI transpose_bytes(VI v) {  // 4 x 4 bytes, in each 16
  const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return (VI)_mm512_shuffle_epi8((__m512i)v, _mm512_broadcast_i32x4(order));
}
#else
struct Table {
  __m256 low, high;
};
TILEWISE_INLINE Table scaled_table(const float* entries, float factor) {
  const __m256 f = _mm256_set1_ps(factor);
  return {_mm256_mul_ps(_mm256_loadu_ps(entries), f), _mm256_mul_ps(_mm256_loadu_ps(entries + 8), f)};
}
TILEWISE_INLINE VF look_up(const Table& t, VU index) {
  const __m256i i = (__m256i)index;
  const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));
  return (VF)_mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, i), _mm256_permutevar8x32_ps(t.high, i), bit3);
}
TILEWISE_INLINE VI saturate_to_u16(VI a, VI b) {
  return (VI)_mm256_packus_epi32((__m256i)a, (__m256i)b);
}
TILEWISE_INLINE VI saturate_to_u8(VI a, VI b) {
  return (VI)_mm256_packus_epi16((__m256i)a, (__m256i)b);
}
TILEWISE_INLINE VI transpose_bytes(VI v) {  // 4 x 4 bytes, in each 16
  const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return (VI)_mm256_shuffle_epi8((__m256i)v, _mm256_broadcastsi128_si256(order));
}
#endif

struct Entries {
  float value[16];
};
constexpr Entries signed_entries() {
  Entries e = {};
  for (int i = 0; i < 9; i++) e.value[kZeroCode + i] = kMagnitudes.value[i];
  for (int i = 1; i < 8; i++) e.value[kZeroCode - i] = -kMagnitudes.value[i];
  return e;
}
constexpr Entries unsigned_entries() {
  Entries e = {};
  for (int i = 0; i < 16; i++) e.value[i] = fourth_power(i + 1.f) * kFourthPowerUnit;
  return e;
}
constexpr Entries kSignedEntries = signed_entries(), kUnsignedEntries = unsigned_entries();

TILEWISE_INLINE void decode(const uint8_t* codes, const Table& table, BlockValues& x) {
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; i++) x[i] = look_up(table, load_words(codes, i % kParts) >> shift_of(i));
}
TILEWISE_INLINE void decode_signed(const uint8_t* codes, float factor, BlockValues& x) {
  decode(codes, scaled_table(kSignedEntries.value, factor), x);
}

// Where the search for an unsigned code starts.
TILEWISE_INLINE int32_t root_start(float scale) {
  return kRootBits - int32_t(float_to_bits(scale) >> 2);
}
TILEWISE_INLINE VI root_starts(VF scales) {
  return kRootBits - ((VI)scales >> 2);
}
TILEWISE_INLINE VI root_bins(VF x, VI start) {
  return __builtin_convertvector((VF)(((VI)x >> 2) + start), VI);
}

// Codes -1..15 (-1 saturates to 0) of all vectors to the block's bytes.
TILEWISE_INLINE VI pack4(const VI (&c)[kVectors], int first) {
  return saturate_to_u8(saturate_to_u16(c[first], c[first + kParts]),
                        saturate_to_u16(c[first + 2 * kParts], c[first + 3 * kParts]));
}
TILEWISE_INLINE void pack(const VI (&c)[kVectors], uint8_t* codes) {
#pragma GCC unroll 2
  for (int part = 0; part < kParts; part++) {
    const VI low = pack4(c, part), high = pack4(c, part + 4 * kParts);
    store(reinterpret_cast<int32_t*>(codes) + part * W, transpose_bytes(low | high << 4));
  }
}

#if defined(__AVX512F__)

TILEWISE_INLINE void decode_unsigned(const uint8_t* codes, float factor, BlockValues& x) {
  decode(codes, scaled_table(kUnsignedEntries.value, factor), x);
}

// Half-octave bins of |x| / scale + kBinOffset hold at most one midpoint each, and none near an edge: the code is
// base + (|x| > midpoint * scale), whatever the rounding of the bin's index.
constexpr float kBinOffset = .058f;
struct Bins {
  float midpoint[16];
  int32_t base[16];
};
constexpr double half_octave(int index) {  // the float with bits index << 22
  double value = index & 1 ? 1.5 : 1.0;
  for (int e = index >> 1; e < 127; e++) value /= 2;
  return value;
}
constexpr Bins make_bins() {
  Bins bins = {};
  for (int index = 0xf5; index <= 0xfe; index++) {  // .046875 to 1.5
    const double low = half_octave(index), high = half_octave(index + 1);
    bins.midpoint[index & 15] = kInfinity;
    bins.base[index & 15] = kZeroCode;
    for (int i = 0; i < 8; i++) {
      const double at = double(kMagnitudes.midpoint[i]) + kBinOffset;
      if (at < low)
        bins.base[index & 15]++;
      else if (at < high)
        bins.midpoint[index & 15] = kMagnitudes.midpoint[i];
    }
  }
  return bins;
}
constexpr Bins kBins = make_bins();
constexpr Entries unsigned_midpoints() {
  Entries e = {};
  for (int i = 0; i < 16; i++) e.value[i] = midpoint_of_fourth_powers(float(i)) * kFourthPowerUnit;
  return e;
}
constexpr Entries kUnsignedMidpoints = unsigned_midpoints();

TILEWISE_INLINE __m512 products_down(const float* a, float b) {
  return _mm512_mul_round_ps(_mm512_loadu_ps(a), _mm512_set1_ps(b), _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
}

struct SignedSearch {
  Table thresholds;
  VF inverse;

  TILEWISE_INLINE explicit SignedSearch(float scale)
      : thresholds{products_down(kBins.midpoint, scale)}, inverse(set1(1 / scale)) {}
  TILEWISE_INLINE VI codes(VF x) const {
    const VF a = abs(x);
    const VU bin = (VU)(a * inverse + set1(kBinOffset)) >> 22;
    const __mmask16 above = _mm512_cmp_ps_mask((__m512)a, (__m512)look_up(thresholds, bin), _CMP_GT_OQ);
    __m512i code = _mm512_permutexvar_epi32((__m512i)bin, _mm512_loadu_si512(kBins.base));
    code = _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(1));
    const __mmask16 negative = _mm512_movepi32_mask((__m512i)x);
    return (VI)_mm512_mask_sub_epi32(code, negative, _mm512_set1_epi32(2 * kZeroCode), code);
  }
};

struct UnsignedSearch {
  Table thresholds;
  VI start;

  TILEWISE_INLINE explicit UnsignedSearch(float scale)
      : thresholds{products_down(kUnsignedMidpoints.value, scale)}, start(set1i(root_start(scale))) {}
  TILEWISE_INLINE VI codes(VF x) const {
    const __m512i bin = (__m512i)root_bins(x, start);
    const __mmask16 below = _mm512_cmp_ps_mask((__m512)x, (__m512)look_up(thresholds, (VU)bin), _CMP_LE_OQ);
    return (VI)_mm512_mask_sub_epi32(bin, below, bin, _mm512_set1_epi32(1));
  }
};

// The same where every value has a scale of its own; x - midpoint * scale rounds once, so its sign is exact.
TILEWISE_INLINE void encode_unsigned(const BlockValues& x, const BlockValues& scales, uint8_t* codes) {
  VI c[kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; i++) {
    const VF unit = scales[i] * kFourthPowerUnit;
    const __m512i bin = (__m512i)root_bins(x[i], root_starts(scales[i]));
    const VF midpoint = midpoint_of_fourth_powers(__builtin_convertvector((VI)bin, VF));
    const __m512 beyond = _mm512_fnmadd_ps((__m512)midpoint, (__m512)unit, (__m512)x[i]);
    const __mmask16 below = _mm512_cmp_ps_mask(beyond, _mm512_setzero_ps(), _CMP_LE_OQ);
    c[i] = (VI)_mm512_mask_sub_epi32(bin, below, bin, _mm512_set1_epi32(1));
  }
  pack(c, codes);
}

#else  // AVX2

TILEWISE_INLINE void decode_unsigned(const uint8_t* codes, float factor, BlockValues& x) {
  const VF unit = set1(factor * kFourthPowerUnit);
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; i++) {
    const VI code = (VI)(load_words(codes, i % kParts) >> shift_of(i)) & 15;
    x[i] = fourth_power(__builtin_convertvector(code, VF) + 1) * unit;
  }
}

// The largest floats <= a * b: the fused remainder rounds once, so its sign is exact.
TILEWISE_INLINE VF products_down(const float* a, float b) {
  const VF factors = load(a), product = factors * set1(b);
  const VF rest = (VF)_mm256_fmsub_ps((__m256)factors, (__m256)set1(b), (__m256)product);
  return (VF)((VI)product + (rest < set1(0)));
}

// Bisection over seven thresholds, then the eighth. A comparison is -1 where true, so `& 4` and `-` turn it into steps.
struct SignedSearch {
  VF thresholds, fourth, eighth;

  TILEWISE_INLINE explicit SignedSearch(float scale) : thresholds(products_down(kMagnitudes.midpoint, scale)) {
    fourth = at(set1i(3)), eighth = at(set1i(7));
  }
  TILEWISE_INLINE VF at(VI i) const { return (VF)_mm256_permutevar8x32_ps((__m256)thresholds, (__m256i)i); }
  TILEWISE_INLINE VI codes(VF x) const {
    const VF a = abs(x);
    VI magnitude = (a > fourth) & 4;
    magnitude |= (a > at(magnitude + 1)) & 2;
    magnitude -= a > at(magnitude);
    magnitude -= a > eighth;
    const VI sign = (VI)x >> 31;
    return (magnitude ^ sign) - sign + kZeroCode;
  }
};

// The fused x - midpoint * unit rounds once, so its sign is exact.
TILEWISE_INLINE VI unsigned_code(VF x, VI start, VF unit) {
  const VI bin = root_bins(x, start);
  const VF midpoint = midpoint_of_fourth_powers(__builtin_convertvector(bin, VF));
  const VF beyond = (VF)_mm256_fnmadd_ps((__m256)midpoint, (__m256)unit, (__m256)x);
  return bin - 1 - (beyond > set1(0));
}
struct UnsignedSearch {
  VI start;
  VF unit;

  TILEWISE_INLINE explicit UnsignedSearch(float scale)
      : start(set1i(root_start(scale))), unit(set1(scale * kFourthPowerUnit)) {}
  TILEWISE_INLINE VI codes(VF x) const { return unsigned_code(x, start, unit); }
};
TILEWISE_INLINE void encode_unsigned(const BlockValues& x, const BlockValues& scales, uint8_t* codes) {
  VI c[kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; i++) c[i] = unsigned_code(x[i], root_starts(scales[i]), scales[i] * kFourthPowerUnit);
  pack(c, codes);
}

#endif
#else  // generic

// The largest float <= a * b, for positive a and b: the product of two floats is exact in double.
TILEWISE_INLINE float product_down(float a, float b) {
  const double exact = double(a) * b;
  const float f = float(exact);
  return f > exact ? bits_to_float(float_to_bits(f) - 1) : f;
}

TILEWISE_INLINE float signed_value(int code) {
  return code < kZeroCode ? -kMagnitudes.value[kZeroCode - code] : kMagnitudes.value[code - kZeroCode];
}

inline void decode_signed(const uint8_t* codes, float factor, BlockValues& x) {
  for (int i = 0; i < kVectors; i++) {
    const VU words = load_words(codes, i % kParts) >> shift_of(i);
    for (int lane = 0; lane < W; lane++) x[i][lane] = signed_value(words[lane] & 15) * factor;
  }
}

inline void decode_unsigned(const uint8_t* codes, float factor, BlockValues& x) {
  for (int i = 0; i < kVectors; i++) {
    const VI code = (VI)(load_words(codes, i % kParts) >> shift_of(i)) & 15;
    x[i] = fourth_power(__builtin_convertvector(code, VF) + 1) * (factor * kFourthPowerUnit);
  }
}

inline void pack(const VI (&c)[kVectors], uint8_t* codes) {
  VI words[kParts] = {};
  for (int i = 0; i < kVectors; i++) words[i % kParts] |= c[i] << shift_of(i);
  for (int part = 0; part < kParts; part++) store(reinterpret_cast<int32_t*>(codes) + part * W, words[part]);
}

struct SignedSearch {
  float thresholds[8];

  explicit SignedSearch(float scale) {
    for (int i = 0; i < 8; i++) thresholds[i] = product_down(kMagnitudes.midpoint[i], scale);
  }
  VI codes(VF x) const {
    VI magnitude = {};
    for (float t : thresholds) magnitude -= abs(x) > set1(t);
    const VI sign = (VI)x >> 31, code = (magnitude ^ sign) - sign + kZeroCode;
    return select(code < 0, VI{}, code);
  }
};

struct UnsignedSearch {
  float thresholds[16];

  explicit UnsignedSearch(float scale) {
    for (int i = 0; i < 16; i++)
      thresholds[i] = product_down(midpoint_of_fourth_powers(float(i)), scale * kFourthPowerUnit);
  }
  VI codes(VF x) const {
    VI code = {};
    for (int t = 1; t < 16; t++) code -= x > set1(thresholds[t]);
    return code;
  }
};

inline void encode_unsigned(const BlockValues& x, const BlockValues& scales, uint8_t* codes) {
  VI c[kVectors];
  for (int i = 0; i < kVectors; i++) {
    for (int lane = 0; lane < W; lane++) {
      c[i][lane] = 0;
      for (int t = 1; t < 16; t++) {
        const double midpoint =
            double(midpoint_of_fourth_powers(float(t))) * double(scales[i][lane] * kFourthPowerUnit);
        c[i][lane] += double(x[i][lane]) > midpoint;
      }
    }
  }
  pack(c, codes);
}

#endif

// Codes of one BlockValues, vector by vector in order; the bytes are complete with the last.
template <class Search>
struct Encoder4 {
  Search search;
  uint8_t* to;
  VI codes[kVectors];

  TILEWISE_INLINE Encoder4(float scale, uint8_t* to) : search(scale), to(to) {}
  TILEWISE_INLINE void put(int i, VF x) {
    codes[i] = search.codes(x);
    if (i == kVectors - 1) pack(codes, to);
  }
};
template <class Encoder>
TILEWISE_INLINE void encode(const BlockValues& x, float scale, uint8_t* codes) {
  Encoder encoder(scale, codes);
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; i++) encoder.put(i, x[i]);
}

// What kernels are templates over. A block of the state is kPieces times BlockValues, which share a scale.
struct Codec4 {
  static constexpr int kBits = 4, kPieces = 1, kElements = kBlock;
  static constexpr int kPieceBytes = kCodeBytes, kBytes = kPieces * kPieceBytes;
  static constexpr float kMinSigned = kMinSignedScale, kMinUnsigned = kMinUnsignedScale;
  using SignedEncoder = Encoder4<SignedSearch>;
  using UnsignedEncoder = Encoder4<UnsignedSearch>;

  TILEWISE_INLINE static void decode_signed(const uint8_t* codes, float factor, BlockValues& x) {
    tilewise::decode_signed(codes, factor, x);
  }
  TILEWISE_INLINE static void decode_unsigned(const uint8_t* codes, float factor, BlockValues& x) {
    tilewise::decode_unsigned(codes, factor, x);
  }
};

template <class Codec>
using StateBlock = BlockValues[Codec::kPieces];

template <class Codec>
TILEWISE_INLINE float signed_scale(const StateBlock<Codec>& x) {
  float scale = Codec::kMinSigned;
#pragma GCC unroll 2
  for (const BlockValues& piece : x) scale = max_of(scale, signed_scale(piece));
  return scale;
}
// Of values that are >= 0 and finite.
template <class Codec>
TILEWISE_INLINE float unsigned_scale(const StateBlock<Codec>& x) {
  uint32_t top = 0;
#pragma GCC unroll 2
  for (const BlockValues& piece : x) top = max_of(top, max_bits(piece));
  return max_of(bits_to_float(top), Codec::kMinUnsigned);
}

}  // namespace
}  // namespace tilewise
