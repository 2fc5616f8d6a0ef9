// Matrix products on AMX tiles, for every floating-point type: an operand is packed as one to three bf16 parts that add
// up to it, and the products of parts that matter are summed in float32.
//
//  - bf16 is one part. fp16 is two, exact: 11 bits are 8 + 3. (Where tiles take fp16, it is one: half_tiles.h.)
//  - float32 is three, exact: 24 bits are 8 + 8 + 8. Of nine products six are kept; the others are below 2^-24. At a
//    tile rate of 15 times that of float32 FMAs this is still more than twice as fast as those.
//
// A tile is 16 rows of 64 bytes: 16 x 32 bf16 as left operand, 16 pairs of rows x 16 columns as right operand, 16 x 16
// floats as result. Packed tiles are contiguous (kTileSize elements), zero where an operand ends within a tile.
#pragma once
#include "common/isa.h"
#include "common/transpose.h"

namespace tilewise {
namespace {

constexpr int kTileRows = 16, kTileDepth = 32;     // rows (or columns) of a tile, and the terms it sums
constexpr int kTileSize = kTileRows * kTileDepth;  // bf16 elements

template <class T>
constexpr int kParts = 1;
template <>
constexpr int kParts<Fp16> = 2;
template <>
constexpr int kParts<float> = 3;

typedef __m512i Halves;   // 32 bf16
typedef uint16_t Packed;  // an element of a packed operand

// ---- the unit ----

// The sizes of the eight tiles: full, unless set otherwise.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles can be used while one of these lives.
class TileScope {
 public:
  explicit TileScope(const TileConfig& config = {}) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }
  ~TileScope() { __asm__ volatile("tilerelease"); }
  TileScope(const TileScope&) = delete;
};

// The compiler's own intrinsics take literals only, and do not say that they read memory.
template <int I>
TILEWISE_INLINE void load_tile(const void* from, int64_t row_bytes) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(I) : "memory");
}
template <int I>
TILEWISE_INLINE void store_tile(void* to, int64_t row_bytes) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(I) : "memory");
}
template <int I>
TILEWISE_INLINE void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(I));
}
template <int C, int A, int B>
TILEWISE_INLINE void multiply_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// Of signed bytes, four of them to a sum, and of unsigned with signed ones; sums are 32-bit integers.
template <int C, int A, int B>
TILEWISE_INLINE void multiply_signed() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
TILEWISE_INLINE void multiply_unsigned() {
  __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// ---- parts ----
// A packed row of 32 terms holds them in pairs: bf16 neighbours, as they lie in memory; parts of wider types the terms
// i and i + 16, which takes a shift and a blend. Both operands of a product are packed alike.

// 16 pairs of a's and b's upper halves.
TILEWISE_INLINE Halves pair_high(VF a, VF b) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32((__m512i)a, 16), (__m512i)b);
}
TILEWISE_INLINE VF high_part(VF v) {
  return (VF)((VI)v & int32_t(0xffff0000));
}

// Finite floats as P parts, each cut off where the next begins: exact for 24 bits in three parts, 16 in two.
template <int P>
TILEWISE_INLINE void split(VF a, VF b, Halves (&parts)[P]) {
#pragma GCC unroll 4
  for (int i = 0; i < P; i++) {
    parts[i] = pair_high(a, b);
    a -= high_part(a);
    b -= high_part(b);
  }
}
// 32 weights; of bf16 they are rounded to nearest even.
TILEWISE_INLINE void split(VF a, VF b, Halves (&parts)[1]) {
  parts[0] = (Halves)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
}

// Infinities leave no remainder (their difference to themselves would be NaN).
TILEWISE_INLINE VF remainder_of(VF v) {
  const __mmask16 infinite = _mm512_fpclass_ps_mask((__m512)v, 0x18);
  return (VF)_mm512_maskz_sub_ps(_knot_mask16(infinite), (__m512)v, (__m512)high_part(v));
}
TILEWISE_INLINE void split_any(VF a, VF b, Halves (&parts)[2]) {
  parts[0] = pair_high(a, b);
  parts[1] = pair_high(remainder_of(a), remainder_of(b));
}
TILEWISE_INLINE void split_any(VF a, VF b, Halves (&parts)[3]) {
  parts[0] = pair_high(a, b);
  a = remainder_of(a);
  b = remainder_of(b);
  parts[1] = pair_high(a, b);
  parts[2] = pair_high(a - high_part(a), b - high_part(b));
}

template <class T>
TILEWISE_INLINE VF load_up_to(const T* from, int64_t n) {
  return n >= W ? load(from) : n > 0 ? load(from, n) : VF{};
}
// Up to 32 elements of a row; those from n on are zero.
TILEWISE_INLINE void load_parts(const Bf16* from, int64_t n, Halves (&parts)[1]) {
  parts[0] = n >= kTileDepth ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16((1u << n) - 1, from);
}
template <class T>
TILEWISE_INLINE void load_parts(const T* from, int64_t n, Halves (&parts)[kParts<T>]) {
  split_any(load_up_to(from, n), load_up_to(from + W, n - W), parts);
}

// ---- packing ----

// Where the tiles of a packed operand lie: [tile][part][step of kTileDepth terms].
template <int P>
struct TileLayout {
  int steps;
  int64_t at(int64_t tile, int part, int64_t step) const { return ((tile * P + part) * steps + step) * kTileSize; }
  int64_t tile_stride() const { return at(1, 0, 0); }
  int64_t part_stride() const { return at(0, 1, 0); }
};

// Rows of a left operand; row(i) gives the address of row i < count (asked once, in order), those up to `padded` are
// zero.
template <class T, class Row>
void pack_left(Packed* to, const TileLayout<kParts<T>>& layout, const Row& row, int count, int padded, int dim) {
  for (int i = 0; i < padded; i++) {
    const T* from = i < count ? row(i) : nullptr;
    for (int k = 0; k < layout.steps; k++) {
      Halves parts[kParts<T>] = {};
      if (from) load_parts(from + k * kTileDepth, dim - k * kTileDepth, parts);
#pragma GCC unroll 4
      for (int p = 0; p < kParts<T>; p++)
        _mm512_store_si512(to + layout.at(i / kTileRows, p, k) + i % kTileRows * kTileDepth, parts[p]);
    }
  }
}

// One tile of a right operand from sixteen rows of which it takes the terms from `first` on, all 32 of them there.
template <int P>
TILEWISE_INLINE void pack_columns(Packed* to, int64_t part_stride, const float* const (&rows)[kTileRows],
                                  int64_t first) {
  for (int c = 0; c < 4; c++) {
    VF low[4], high[4];
    load_columns([&](int i) { return rows[i] + first; }, c, low);
    load_columns([&](int i) { return rows[i] + first + W; }, c, high);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      Halves parts[P];
      split_any(low[i], high[i], parts);
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) _mm512_store_si512(to + p * part_stride + (4 * c + i) * kTileDepth, parts[p]);
    }
  }
}
// Pairs of bf16 move like floats.
template <int P>
TILEWISE_INLINE void pack_columns(Packed* to, int64_t, const Bf16* const (&rows)[kTileRows], int64_t first) {
  for (int c = 0; c < 4; c++) {
    VF columns[4];
    load_columns([&](int i) { return reinterpret_cast<const float*>(rows[i] + first); }, c, columns);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) store(reinterpret_cast<float*>(to + (4 * c + i) * kTileDepth), columns[i]);
  }
}
// fp16, and tiles at an edge: by way of rows in memory, zero where the operand ends.
template <class T>
TILEWISE_INLINE void pack_columns_at_edge(Packed* to, int64_t part_stride, const T* const (&rows)[kTileRows],
                                          int64_t first, int dim) {
  for (int i = 0; i < kTileRows; i++) {
    Halves parts[kParts<T>] = {};
    if (rows[i]) load_parts(rows[i] + first, dim - first, parts);
#pragma GCC unroll 4
    for (int p = 0; p < kParts<T>; p++) _mm512_store_si512(to + p * part_stride + i * kTileDepth, parts[p]);
  }
  for (int p = 0; p < kParts<T>; p++) transpose_in_memory(reinterpret_cast<float*>(to + p * part_stride));
}

// Rows that become the columns of a right operand: pairs of terms are transposed, 16 rows at a time; row(i) as in
// pack_left.
template <class T, class Row>
void pack_right_transposed(Packed* to, const TileLayout<kParts<T>>& layout, const Row& row, int count, int padded,
                           int dim) {
  for (int first = 0; first < padded; first += kTileRows) {
    const T* rows[kTileRows];
    for (int i = 0; i < kTileRows; i++) rows[i] = first + i < count ? row(first + i) : nullptr;
    for (int k = 0; k < layout.steps; k++) {
      Packed* at = to + layout.at(first / kTileRows, 0, k);
      const bool whole = first + kTileRows <= count && (k + 1) * kTileDepth <= dim;
      if constexpr (kParts<T> != 2)
        if (whole) {
          pack_columns<kParts<T>>(at, layout.part_stride(), rows, k * kTileDepth);
          continue;
        }
      pack_columns_at_edge(at, layout.part_stride(), rows, k * kTileDepth, dim);
    }
  }
}

// Two rows of a right operand, all columns up to whole pairs of tiles: the pairs of their terms stand ready in the
// vectors.
template <class T>
TILEWISE_INLINE void pack_row_pair(Packed* to, const TileLayout<kParts<T>>& layout, const T* first, const T* second,
                                   int dim) {
  for (int d = 0; d < round_up(dim, kTileDepth); d += W, to += layout.tile_stride()) {
    Halves parts[kParts<T>];
    split_any(first ? load_up_to(first + d, dim - d) : VF{}, second ? load_up_to(second + d, dim - d) : VF{}, parts);
#pragma GCC unroll 4
    for (int p = 0; p < kParts<T>; p++) _mm512_store_si512(to + p * layout.part_stride(), parts[p]);
  }
}
// Of bf16, rows are interleaved within 128-bit lanes: of 32 columns the first tile gets 0-3, 8-11, 16-19 and 24-27.
// natural_columns() undoes that in the result.
TILEWISE_INLINE void pack_row_pair(Packed* to, const TileLayout<1>& layout, const Bf16* first, const Bf16* second,
                                   int dim) {
  for (int d = 0; d < dim; d += kTileDepth, to += 2 * layout.tile_stride()) {
    Halves a[1] = {}, b[1] = {};
    if (first) load_parts(first + d, dim - d, a);
    if (second) load_parts(second + d, dim - d, b);
    _mm512_store_si512(to, _mm512_unpacklo_epi16(a[0], b[0]));
    _mm512_store_si512(to + layout.tile_stride(), _mm512_unpackhi_epi16(a[0], b[0]));
  }
}
template <int P>
constexpr int natural_column(int i) {  // the column that stands at place i of 32
  return P > 1 ? i : i % 16 / 4 * 8 + i / 16 * 4 + i % 4;
}
template <int P>
TILEWISE_INLINE void natural_columns(VF& low, VF& high) {
  if (P > 1) return;
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const VF joined = (VF)_mm512_permutex2var_ps((__m512)low, first, (__m512)high);
  high = (VF)_mm512_permutex2var_ps((__m512)low, _mm512_add_epi32(first, _mm512_set1_epi32(8)), (__m512)high);
  low = joined;
}

// Rows of a right operand (`layout.steps` counts rows, a tile has 16 columns); row(i) as in pack_left, but in the order
// of the pairs.
template <class T, class Row>
void pack_right(Packed* to, const TileLayout<kParts<T>>& layout, const Row& row, int count, int padded, int dim) {
  constexpr int kStep = kParts<T> == 1 ? 2 : 1, kPartner = kParts<T> == 1 ? 1 : kTileRows;
  for (int begin = 0; begin < padded; begin += kTileDepth) {
    Packed* at = to + layout.at(0, 0, begin / kTileDepth);
    for (int i = 0; i < kTileRows; i++, at += kTileDepth) {
      const int first = begin + i * kStep, second = first + kPartner;
      const T* a = first < count ? row(first) : nullptr;
      const T* b = second < count ? row(second) : nullptr;
      pack_row_pair(at, layout, a, b, dim);
    }
  }
}

// Up to 32 rows whose columns become the rows of a left operand, as its step `step`; their pairs are the rows i and
// i + 16, of every type. The result's rows are in the order of pack_row_pair().
template <class T, class Row>
void pack_left_transposed(Packed* to, const TileLayout<kParts<T>>& layout, int step, const Row& row, int count,
                          int dim) {
  to += layout.at(0, 0, step);
  for (int i = 0; i < kTileRows; i++) {
    const T* first = i < count ? row(i) : nullptr;
    const T* second = i + kTileRows < count ? row(i + kTileRows) : nullptr;
    pack_row_pair(to + i * kTileDepth, layout, first, second, dim);
  }
  const int64_t tiles = round_up(dim, kTileDepth) / kTileRows;
  for (int64_t t = 0; t < tiles; t++)
    for (int p = 0; p < kParts<T>; p++) transpose_in_memory(reinterpret_cast<float*>(to + layout.at(t, p, 0)));
}

// The square v[row i or i + 16][low or high half of 32 columns] as rows of a left operand (terms are columns), and as
// pairs for a right operand (terms are rows): pairs[n] belongs to its tile n of columns. Of one part, columns are in
// the order of pack_row_pair().
template <int P>
TILEWISE_INLINE void split_square(const VF (&v)[2][2], Halves (&rows)[2][P], Halves (&pairs)[2][P]) {
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    split(v[i][0], v[i][1], rows[i]);
    split(v[0][i], v[1][i], pairs[i]);
  }
}
TILEWISE_INLINE void pair_rows(const Halves (&rows)[2][1], Halves (&pairs)[2][1]) {
  pairs[0][0] = _mm512_unpacklo_epi16(rows[0][0], rows[1][0]);
  pairs[1][0] = _mm512_unpackhi_epi16(rows[0][0], rows[1][0]);
}
TILEWISE_INLINE void split_square(const VF (&v)[2][2], Halves (&rows)[2][1], Halves (&pairs)[2][1]) {
  split(v[0][0], v[0][1], rows[0]);
  split(v[1][0], v[1][1], rows[1]);
  pair_rows(rows, pairs);
}

// ---- products ----

// A run of packed tiles: the first, and how far it is to the next part and to the next tile.
struct TileRun {
  const Packed* first;
  int64_t part_stride, tile_stride;
};
template <int P>
TILEWISE_INLINE TileRun run_of(const Packed* packed, const TileLayout<P>& layout, int64_t tile) {
  return {packed + layout.at(tile, 0, 0), layout.part_stride(), layout.tile_stride()};
}

struct Bf16Products {
  template <int C, int A, int B>
  static TILEWISE_INLINE void multiply() {
    multiply_tiles<C, A, B>();
  }
};

// Which products of parts are summed, in an order in which mostly one operand stays. The first one is the large one: it
// is added for all terms after the others, so that only its own additions round at the size of the sum.
template <int P>
struct PartProducts : Bf16Products {
  static constexpr int count = 1, left[] = {0}, right[] = {0};
};
template <>
struct PartProducts<2> : Bf16Products {
  static constexpr int count = 4, left[] = {0, 1, 1, 0}, right[] = {0, 0, 1, 1};
};
template <>
struct PartProducts<3> : Bf16Products {
  static constexpr int count = 6, left[] = {0, 1, 2, 0, 1, 0}, right[] = {0, 0, 0, 1, 1, 2};
};

// One or two by two, or one by four result tiles, which is as many as cover the latency of a product and leave room for
// the operands: c[16 m + i][16 n + j] = sum over k of left[16 m + i][k] * right[k][16 n + j], added to what c holds if
// `add`.
template <int M, int N>
TILEWISE_INLINE void begin_tiles(const float* c, int64_t c_stride, bool add) {
  if (!add) {
    zero_tile<0>();
    zero_tile<1>();
    if constexpr (M * N == 4) zero_tile<2>();
    if constexpr (M * N == 4) zero_tile<3>();
    return;
  }
  const int64_t row_bytes = c_stride * sizeof(float);
  const float* rest = N == 4 ? c + 2 * kTileRows : c + kTileRows * c_stride;
  load_tile<0>(c, row_bytes);
  load_tile<1>(c + kTileRows, row_bytes);
  if constexpr (M * N == 4) load_tile<2>(rest, row_bytes);
  if constexpr (M * N == 4) load_tile<3>(rest + kTileRows, row_bytes);
}
template <int M, int N>
TILEWISE_INLINE void end_tiles(float* c, int64_t c_stride) {
  const int64_t row_bytes = c_stride * sizeof(float);
  float* rest = N == 4 ? c + 2 * kTileRows : c + kTileRows * c_stride;
  store_tile<0>(c, row_bytes);
  store_tile<1>(c + kTileRows, row_bytes);
  if constexpr (M * N == 4) store_tile<2>(rest, row_bytes);
  if constexpr (M * N == 4) store_tile<3>(rest + kTileRows, row_bytes);
}

// Adds the products [Begin, End) of step k.
template <int P, int M, int N, class Products, int Begin = 0, int End = Products::count>
TILEWISE_INLINE void multiply_step(const TileRun& left, const TileRun& right, int k) {
#pragma GCC unroll 8
  for (int i = Begin; i < End; i++) {
    const Packed* a = left.first + Products::left[i] * left.part_stride + k * kTileSize;
    const Packed* b = right.first + Products::right[i] * right.part_stride + k * kTileSize;
    const bool new_left = i == Begin || Products::left[i] != Products::left[i - 1];
    const bool new_right = i == Begin || Products::right[i] != Products::right[i - 1];
    if (new_left) load_tile<4>(a, 64);
    if constexpr (N == 4) {
      load_tile<5>(b, 64);
      load_tile<6>(b + right.tile_stride, 64);
      load_tile<7>(b + 2 * right.tile_stride, 64);
      Products::template multiply<0, 4, 5>();
      load_tile<5>(b + 3 * right.tile_stride, 64);
      Products::template multiply<1, 4, 6>();
      Products::template multiply<2, 4, 7>();
      Products::template multiply<3, 4, 5>();
    } else {
      if (new_right) load_tile<6>(b, 64);
      Products::template multiply<0, 4, 6>();
      if (new_right) load_tile<7>(b + right.tile_stride, 64);
      Products::template multiply<1, 4, 7>();
      if constexpr (M == 2) {
        if (new_left) load_tile<5>(a + left.tile_stride, 64);
        Products::template multiply<2, 5, 6>();
        Products::template multiply<3, 5, 7>();
      }
    }
  }
}

template <int P, int M, int N, class Products = PartProducts<P>>
TILEWISE_INLINE void multiply_packed(const TileRun& left, const TileRun& right, int steps, float* c, int64_t c_stride,
                                     bool add) {
  begin_tiles<M, N>(c, c_stride, add);
  if constexpr (Products::count > 1)
    for (int k = 0; k < steps; k++) multiply_step<P, M, N, Products, 1, Products::count>(left, right, k);
  for (int k = 0; k < steps; k++) multiply_step<P, M, N, Products, 0, 1>(left, right, k);
  end_tiles<M, N>(c, c_stride);
}

// The same for M rows of tiles and any even number of columns of tiles.
template <int P, int M, class Products = PartProducts<P>>
TILEWISE_INLINE void multiply_columns(const TileRun& left, const Packed* right, const TileLayout<P>& layout, int tiles,
                                      int steps, float* c, int64_t c_stride, bool add) {
  int n = 0;
  if constexpr (M == 1)
    for (; n + 4 <= tiles; n += 4)
      multiply_packed<P, 1, 4, Products>(left, run_of(right, layout, n), steps, c + n * kTileRows, c_stride, add);
  for (; n < tiles; n += 2)
    multiply_packed<P, M, 2, Products>(left, run_of(right, layout, n), steps, c + n * kTileRows, c_stride, add);
}

// multiply_columns() in small steps, to be taken between vector instructions that need none of it.
template <int P, class Products = PartProducts<P>>
class MultiplyInSteps {
 public:
  MultiplyInSteps() = default;
  MultiplyInSteps(int m, const TileRun& left, const Packed* right, const TileLayout<P>& layout, int tiles, float* c,
                  int64_t c_stride)
      : m_(m), tiles_(tiles), layout_(layout), left_(left), right_(right), c_(c), stride_(c_stride) {}

  int steps() const { return tiles_ / 2 * passes(); }
  TILEWISE_INLINE void take(int steps) {
    for (; steps > 0 && n_ < tiles_; steps--) m_ == 2 ? step<2>() : step<1>();
  }

 private:
  int m_ = 1, tiles_ = 0, n_ = 0, k_ = 0;
  TileLayout<P> layout_{0};
  TileRun left_{};
  const Packed* right_ = nullptr;
  float* c_ = nullptr;
  int64_t stride_ = 0;

  int passes() const { return Products::count > 1 ? 2 * layout_.steps : layout_.steps; }  // over a pair of columns
  template <int M>
  TILEWISE_INLINE void step() {
    if (k_ == 0) begin_tiles<M, 2>(c_, stride_, false);
    const TileRun right = run_of(right_, layout_, n_);
    if (Products::count > 1 && k_ < layout_.steps)
      multiply_step<P, M, 2, Products, 1, Products::count>(left_, right, k_);
    else
      multiply_step<P, M, 2, Products, 0, 1>(left_, right, k_ % layout_.steps);
    if (++k_ < passes()) return;
    end_tiles<M, 2>(c_ + n_ * kTileRows, stride_);
    n_ += 2;
    k_ = 0;
  }
};

}  // namespace
}  // namespace tilewise
