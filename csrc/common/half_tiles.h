// fp16 and float32 on AMX tiles of fp16, at the level `amx_fp16`. fp16 is multiplied as it is. A float32 number is two
// fp16 parts, and the four products of parts are summed in float32.
//
// Each part is rounded to nearest: 11 bits, and 12 of what is left with its sign. So two parts are off by 2^-23 at
// most, as random as one rounding of float32. (Three products, without low times low, leave out up to 2^-22: sums of
// few terms then differ by more than twice what float32 costs.) That is two thirds of the products of three parts in
// bf16 (tiles.h), each at the same speed, but only within fp16's range. So a row or a block is multiplied with a power
// of two that brings its largest number near the upper end; numbers down to 2^-15 of that keep all their bits, and none
// is off by more than 2^-39 of it. (A block may take the power of one before it: 2^-9 and 2^-33 then, at worst.)
#pragma once
#include "common/tiles.h"

namespace tilewise {
namespace {

// The products of P parts, as in bf16.
template <int P>
struct HalfProducts : PartProducts<P> {
  // tdpfp16ps, which not every assembler knows.
  template <int C, int A, int B>
  static TILEWISE_INLINE void multiply() {
    __asm__ volatile(".byte 0xc4, 0xe2, %c0, 0x5c, %c1" ::"i"((~B & 15) << 3 | 3), "i"(0xc0 | C << 3 | A));
  }
};

using HalfLayout = TileLayout<2>;

// ---- scales ----

// The power of two that brings `most` into [2^exponent, 2^(exponent + 1)); 1 for 0 and what is not finite.
inline float scale_to(int exponent, float most) {
  const int biased = int(__builtin_bit_cast(uint32_t, most) >> 23);
  if (!(most > 0) || biased == 255) return 1;
  return __builtin_bit_cast(float, uint32_t(min_of(max_of(127 + exponent + 127 - biased, 1), 253)) << 23);
}
// The largest magnitude, lane by lane.
TILEWISE_INLINE VF larger(VF a, VF b) {
  constexpr int kMagnitude = 0x0b;
  return (VF)_mm512_range_ps((__m512)a, (__m512)b, kMagnitude);
}
// Of the rows added: four chains, as each step takes four cycles.
struct Largest {
  VF lanes[4] = {};

  TILEWISE_INLINE void add(const float* row, int dim) {
    int d = 0;
    for (; d + 4 * W <= dim; d += 4 * W)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) lanes[i] = larger(lanes[i], load(row + d + i * W));
    for (; d < dim; d += W) lanes[0] = larger(lanes[0], load_up_to(row + d, dim - d));
  }
  TILEWISE_INLINE void add(VF low, VF high) {
    lanes[0] = larger(lanes[0], low);
    lanes[1] = larger(lanes[1], high);
  }
  float most() const { return reduce_max(larger(larger(lanes[0], lanes[1]), larger(lanes[2], lanes[3]))); }
};

// ---- packing; 32 terms are in the order of memory, so they move as bf16 does ----

TILEWISE_INLINE void split_halves(VF a, VF b, Halves (&parts)[1]) {
  const __m256i low = _mm512_cvtps_ph((__m512)a, _MM_FROUND_TO_NEAREST_INT);
  parts[0] = _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm512_cvtps_ph((__m512)b, _MM_FROUND_TO_NEAREST_INT), 1);
}
TILEWISE_INLINE void split_halves(VF a, VF b, Halves (&parts)[2]) {
  const VF two[2] = {a, b};
  __m256i high[2], low[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    high[i] = _mm512_cvtps_ph((__m512)two[i], _MM_FROUND_TO_NEAREST_INT);
    low[i] = _mm512_cvtps_ph(_mm512_sub_ps((__m512)two[i], _mm512_cvtph_ps(high[i])), _MM_FROUND_TO_NEAREST_INT);
  }
  parts[0] = _mm512_inserti64x4(_mm512_castsi256_si512(high[0]), high[1], 1);
  parts[1] = _mm512_inserti64x4(_mm512_castsi256_si512(low[0]), low[1], 1);
}
// Up to 32 elements of a row; those from n on are zero.
TILEWISE_INLINE void load_halves(const float* from, int64_t n, VF scale, Halves (&parts)[2]) {
  if (n >= kTileDepth) return split_halves(load(from) * scale, load(from + W) * scale, parts);
  split_halves(load_up_to(from, n) * scale, load_up_to(from + W, n - W) * scale, parts);
}
// The same, and what the largest of them is.
TILEWISE_INLINE void load_halves(const float* from, int64_t n, VF scale, Largest& largest, Halves (&parts)[2]) {
  const bool whole = n >= kTileDepth;
  const VF low = whole ? load(from) : load_up_to(from, n), high = whole ? load(from + W) : load_up_to(from + W, n - W);
  largest.add(low, high);
  split_halves(low * scale, high * scale, parts);
}

// Rows of a left operand, each with a scale of its own, whose inverse goes to `units`.
template <class Row>
void pack_left_halves(Packed* to, float* units, const HalfLayout& layout, const Row& row, int count, int padded,
                      int dim) {
  for (int i = 0; i < padded; i++) {
    const float* from = i < count ? row(i) : nullptr;
    Largest largest;
    if (from) largest.add(from, dim);
    const float scale = scale_to(14, largest.most());
    units[i] = 1 / scale;
    for (int k = 0; k < layout.steps; k++) {
      Halves parts[2] = {};
      if (from) load_halves(from + k * kTileDepth, dim - k * kTileDepth, set1(scale), parts);
#pragma GCC unroll 2
      for (int p = 0; p < 2; p++)
        _mm512_store_si512(to + layout.at(i / kTileRows, p, k) + i % kTileRows * kTileDepth, parts[p]);
    }
  }
}

// Rows that become the columns of a right operand; row(i) as in pack_left(). Returns the largest magnitude there.
template <class Row>
float pack_right_halves_transposed(Packed* to, const HalfLayout& layout, const Row& row, int count, int padded, int dim,
                                   VF scale) {
  alignas(64) float split[2][kTileRows * W];  // pairs of fp16
  Largest largest;
  for (int first = 0; first < padded; first += kTileRows) {
    const float* rows[kTileRows];
    for (int k = 0; k < layout.steps; k++) {
      for (int i = 0; i < kTileRows; i++) {
        if (k == 0) rows[i] = first + i < count ? row(first + i) : nullptr;
        Halves parts[2] = {};
        if (rows[i]) load_halves(rows[i] + k * kTileDepth, dim - k * kTileDepth, scale, largest, parts);
#pragma GCC unroll 2
        for (int p = 0; p < 2; p++) _mm512_store_si512(split[p] + i * W, parts[p]);
      }
#pragma GCC unroll 2
      for (int p = 0; p < 2; p++) {
        float* at = reinterpret_cast<float*>(to + layout.at(first / kTileRows, p, k));
        for (int c = 0; c < 4; c++) {
          VF columns[4];
          load_columns([&](int i) { return split[p] + i * W; }, c, columns);
#pragma GCC unroll 4
          for (int i = 0; i < 4; i++) store(at + (4 * c + i) * W, columns[i]);
        }
      }
    }
  }
  return largest.most();
}

// Rows of a right operand, likewise; columns are in the order of bf16 (natural_columns<1>).
template <class Row>
float pack_right_halves(Packed* to, const HalfLayout& layout, const Row& row, int count, int padded, int dim,
                        VF scale) {
  Largest largest;
  for (int i = 0; i < padded; i += 2) {
    Packed* at = to + layout.at(0, 0, i / kTileDepth) + i % kTileDepth / 2 * kTileDepth;
    const float* first = i < count ? row(i) : nullptr;
    const float* second = i + 1 < count ? row(i + 1) : nullptr;
    for (int d = 0; d < dim; d += kTileDepth, at += 2 * layout.tile_stride()) {
      Halves a[2] = {}, b[2] = {};
      if (first) load_halves(first + d, dim - d, scale, largest, a);
      if (second) load_halves(second + d, dim - d, scale, largest, b);
#pragma GCC unroll 2
      for (int p = 0; p < 2; p++) {
        _mm512_store_si512(at + p * layout.part_stride(), _mm512_unpacklo_epi16(a[p], b[p]));
        _mm512_store_si512(at + p * layout.part_stride() + layout.tile_stride(), _mm512_unpackhi_epi16(a[p], b[p]));
      }
    }
  }
  return largest.most();
}

}  // namespace
}  // namespace tilewise
