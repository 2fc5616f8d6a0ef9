// 2:4 on AMX tiles, for bf16 and (where tiles multiply it) fp16: weights are expanded, zeros included, on their way
// into tiles, between the products of other weights.
//
// A tile multiplies the zeros too, and zero times infinity is NaN. In the forward, rows of x that are not finite are
// therefore left to the vectors, which ignore what no weight was kept for; the other rows are as they would be without.
#pragma once
#include "sparse/cpu/nm_backward.h"
#include "sparse/cpu/tile_blocks.h"

namespace tilewise {
namespace {

// ---- expanding ----

// Of 64 bytes of indices, bits instead of positions: a nibble's four bits say which inputs are kept. The unused nibble
// of an odd number of groups keeps none.
TILEWISE_INLINE __m512i kept_bits(__m512i indices) {
  const __m128i table = _mm_setr_epi8(0, 0, 0, 0, 0b0011, 0, 0, 0, 0b0101, 0b0110, 0, 0, 0b1001, 0b1010, 0b1100, 0);
  const __m512i low_bits = _mm512_broadcast_i32x4(table), low = _mm512_set1_epi8(15);
  const __m512i high_bits = _mm512_slli_epi16(low_bits, 4);
  return _mm512_or_si512(_mm512_shuffle_epi8(low_bits, _mm512_and_si512(indices, low)),
                         _mm512_shuffle_epi8(high_bits, _mm512_and_si512(_mm512_srli_epi16(indices, 4), low)));
}
// 32 inputs, of which the kept ones are the next values; `count` may be read.
TILEWISE_INLINE Halves expand(const Bf16* values, int64_t count, uint32_t bits) {
  const __m256i kept = count >= kTileRows ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values))
                                          : _mm256_maskz_loadu_epi16(lane_mask(count), values);
  return _mm512_maskz_expand_epi16(bits, _mm512_castsi256_si512(kept));
}

struct Weights {
  const Bf16* values;      // [out, in / 2]
  const uint8_t* indices;  // [out, ceil(in / 8)]
  int64_t out, in;

  template <class Params>
  explicit Weights(const Params& p)
      : values(static_cast<const Bf16*>(p.values)), indices(p.indices), out(p.out), in(p.in) {}

  // Rows as those of a left operand: part by part, 16 steps of one row.
  static constexpr int kRowSteps = 64 / (kTileDepth / 8);  // whose indices are one vector

  int64_t row_parts(int64_t first, int64_t steps) const {
    return round_up(min_of<int64_t>(kPanel, out - first), kPair) * ceil_div(steps, kRowSteps);
  }
  TILEWISE_INLINE void expand_row(Packed* to, const TileLayout<1>& layout, int64_t first, int64_t step,
                                  int64_t part) const {
    const int64_t chunks = ceil_div(layout.steps, kRowSteps), i = part / chunks, k = part % chunks * kRowSteps;
    const int64_t count = min_of<int64_t>(kRowSteps, layout.steps - k), group = kTileDepth * (step + k) / 8;
    const int64_t row = first + i, bytes = ceil_div(in, 8), left = bytes - group;
    Packed* at = to + layout.at(i / kTileRows, 0, k) + i % kTileRows * kTileDepth;
    if (row >= out) {
      for (int64_t s = 0; s < count; s++) _mm512_store_si512(at + s * kTileSize, Halves{});
      return;
    }
    alignas(64) uint32_t bits[kRowSteps];
    const __mmask64 there = left >= 64 ? ~0ull : (1ull << left) - 1;
    _mm512_store_si512(bits, kept_bits(_mm512_maskz_loadu_epi8(there, indices + row * bytes + group)));
    const Bf16* from = values + row * (in / 2) + 4 * group;
    for (int64_t s = 0; s < count; s++)
      _mm512_store_si512(at + s * kTileSize, expand(from + s * kTileRows, in / 2 - 4 * group - s * kTileRows, bits[s]));
  }

  // Asks the second-level cache for what a row has in these steps: 64 rows are more streams than hardware follows.
  TILEWISE_INLINE void ask(int64_t row, int64_t step, int64_t steps) const {
    const Bf16* from = values + row * (in / 2) + step * kTileRows;
    for (int64_t i = 0; i < steps * kTileRows; i += 32) __builtin_prefetch(from + i, 0, 2);
    __builtin_prefetch(indices + row * ceil_div(in, 8) + step * (kTileDepth / 8), 0, 2);
  }

  // Indices by panels of 64 columns, [ceil(in / 64), out] words: in rows, those of a panel would take a cache line
  // each.
  const uint64_t* indices_by_panels(const Runtime& rt) const {
    constexpr int64_t kRows = 64;  // whose lines stay in the first-level cache
    const int64_t bytes = ceil_div(in, 8), panels = ceil_div(in, kPanel);
    uint64_t* words = scratch<uint64_t>(rt, kIndexSlot, panels * out);
    if (!words) return nullptr;
    parallel_for(rt, ceil_div(out, kRows), 1, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin * kRows; first < min_of(out, end * kRows); first += kRows)
        for (int64_t panel = 0; panel < panels; panel++) {
          const int64_t left = min_of<int64_t>(8, bytes - 8 * panel);
          for (int64_t row = first; row < min_of(out, first + kRows); row++) {
            const uint8_t* from = indices + row * bytes + 8 * panel;
            uint64_t word = 0;
            if (left == 8)
              __builtin_memcpy(&word, from, 8);
            else
              __builtin_memcpy(&word, from, left);
            words[panel * out + row] = word;
          }
        }
    });
    return words;
  }

  // Columns as those of a right operand, in the order of pack_row_pair(): part by part, two rows of 64. Terms are rows.
  int64_t column_parts(int64_t steps) const { return steps * kTileRows; }
  TILEWISE_INLINE void expand_columns(Packed* to, const TileLayout<1>& layout, const uint64_t* by_panels, int64_t first,
                                      int64_t step, int64_t part) const {
    const int64_t row = step * kTileDepth + 2 * part;
    const __m128i words =
        _mm_maskz_loadu_epi64(lane_mask(max_of<int64_t>(out - row, 0)) & 3, by_panels + first / kPanel * out + row);
    alignas(64) uint32_t bits[16];
    _mm512_store_si512(bits, kept_bits(_mm512_zextsi128_si512(words)));
    Packed* at = to + part * kTileDepth;
    for (int64_t c = 0; c < kPanel && first + c < in; c += kPair, at += 2 * layout.tile_stride()) {
      Halves rows[2] = {};
      for (int r = 0; r < 2 && row + r < out; r++)
        rows[r] = expand(values + ((row + r) * in + first + c) / 2, (in - first - c) / 2, bits[2 * r + c / kPair]);
      _mm512_store_si512(at, _mm512_unpacklo_epi16(rows[0], rows[1]));
      _mm512_store_si512(at + layout.tile_stride(), _mm512_unpackhi_epi16(rows[0], rows[1]));
    }
  }
};

// ---- results ----

TILEWISE_INLINE Halves round_to(Bf16, VF low, VF high) {
  Halves parts[1];
  split(low, high, parts);
  return parts[0];
}
TILEWISE_INLINE Halves round_to(Fp16, VF low, VF high) {
  Halves parts[1];
  split_halves(low, high, parts);
  return parts[0];
}
template <class T>
TILEWISE_INLINE void store_rounded(T* to, VF low, VF high, int64_t n) {
  const Halves rounded = round_to(T{}, low, high);
  n >= kPair ? _mm512_storeu_si512(to, rounded) : _mm512_mask_storeu_epi16(to, (1u << n) - 1, rounded);
}

// ---- rows that are not finite ----

template <class T>
constexpr int16_t kExponent = 0x7f80;
template <>
constexpr int16_t kExponent<Fp16> = 0x7c00;

template <class T>
inline bool finite(const T* row, int64_t n) {
  const __m512i exponent = _mm512_set1_epi16(kExponent<T>);
  __mmask32 full = 0;
  for (int64_t i = 0; i < n; i += 32) {
    Halves v[1];
    load_parts(reinterpret_cast<const Bf16*>(row + i), n - i, v);
    full |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(v[0], exponent), exponent);
  }
  return !full;
}

// One bit per row.
struct RedoRows {
  uint32_t* words;
  int64_t rows;

  RedoRows(const Runtime& rt, int64_t rows) : words(scratch<uint32_t>(rt, kRedoSlot, ceil_div(rows, 32))), rows(rows) {}
  bool at(int64_t row) const { return row < rows && words[row / 32] >> row % 32 & 1; }

  // Of 32 rows from `first` on.
  template <class T>
  void look(const T* from, int64_t stride, int64_t first, int64_t n) const {
    uint32_t word = 0;
    for (int64_t i = 0; i < min_of<int64_t>(32, rows - first); i++)
      word |= uint32_t(!finite(from + (first + i) * stride, n)) << i;
    words[first / 32] = word;
  }
  // redo(first row, count), run by run.
  template <class F>
  const char* each(const F& redo) const {
    for (int64_t row = 0; row < rows; row++) {
      if (!at(row)) continue;
      const int64_t first = row;
      while (at(row)) row++;
      if (const char* why = redo(first, row - first)) return why;
    }
    return nullptr;
  }
};

// ---- forward: weights are the left operand, rows of x the columns of the right ----

template <class T>
struct ForwardTiles {
  static constexpr bool kPanelIsLeft = true;
  const NmForwardParams& p;
  const RedoRows& redo;
  const Weights weights{p};

  int64_t held() const { return p.rows; }
  int64_t panel() const { return p.out; }
  int64_t terms() const { return p.in; }

  void pack(Packed* to, const TileLayout<1>& layout, int64_t first) const {
    const Bf16* x = static_cast<const Bf16*>(p.x);
    redo.look(static_cast<const T*>(p.x), p.x_stride, first, p.in);
    const int count = static_cast<int>(min_of<int64_t>(kPair, p.rows - first));
    pack_right_transposed<Bf16>(
        to, layout, [&](int i) { return x + (first + i) * p.x_stride; }, count, kPair, static_cast<int>(p.in));
  }
  int64_t parts(int64_t first, int64_t steps) const { return weights.row_parts(first, steps); }
  TILEWISE_INLINE void make(Packed* to, const TileLayout<1>& layout, int64_t first, int64_t step, int64_t part) const {
    weights.expand_row(to, layout, first, step, part);
  }
  void expect(int64_t o, int64_t row, int part) const {
    T* y = static_cast<T*>(p.y) + (row + 4 * part) * p.out + o;
    for (int i = 0; i < 4; i++) __builtin_prefetch(y + i * p.out, 1);
  }
  TILEWISE_INLINE void finish(const float* sums, int64_t o, int64_t row, int part) const {
    const int64_t outputs = p.out - o;
    const T* b = static_cast<const T*>(p.bias);
    const VF bias[2] = {b ? load_up_to(b + o, outputs) : VF{}, b ? load_up_to(b + o + W, outputs - W) : VF{}};
    VF low[4], high[4];
    load_columns([&](int i) { return sums + i * kPair; }, part, low);
    load_columns([&](int i) { return sums + (kTileRows + i) * kPair; }, part, high);
    row += 4 * part;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
      if (row + i < p.rows)
        store_rounded(static_cast<T*>(p.y) + (row + i) * p.out + o, low[i] + bias[0], high[i] + bias[1], outputs);
  }
};

// Up to 32 rows of x, one or two columns of tiles: bound by the bytes of weights. Those of 64 or 32 outputs are
// expanded a few steps at a time and multiplied from the first-level cache; their sums stay in tiles over all terms.
constexpr int64_t kLookUpRows = 2;  // up to here vectors are faster
constexpr int64_t kFewSteps = 8;

template <class Products>
TILEWISE_INLINE void multiply_column(const TileRun& left, const TileRun& right, int k) {
  const Packed* a = left.first + k * kTileSize;
  load_tile<4>(right.first + k * kTileSize, 64);
  load_tile<5>(a, 64);
  Products::template multiply<0, 5, 4>();
  load_tile<6>(a + left.tile_stride, 64);
  Products::template multiply<1, 6, 4>();
  load_tile<7>(a + 2 * left.tile_stride, 64);
  Products::template multiply<2, 7, 4>();
  load_tile<5>(a + 3 * left.tile_stride, 64);
  Products::template multiply<3, 5, 4>();
}

inline void end_column(float* sums) {
  constexpr int64_t kRowBytes = kPair * sizeof(float);
  store_tile<0>(sums, kRowBytes);
  store_tile<1>(sums + kSquare / 2, kRowBytes);
  store_tile<2>(sums + kSquare, kRowBytes);
  store_tile<3>(sums + kSquare / 2 * 3, kRowBytes);
}

template <class T, class Products, int Columns>
void few_outputs(const ForwardTiles<T>& job, const TileRun& x, int64_t steps, int64_t first) {
  constexpr int kOutputs = kPanel / Columns;
  alignas(64) Packed made[kFewSteps * kOutputs * kTileDepth];
  alignas(64) float sums[2 * kSquare];  // of one column of tiles, the left halves of squares
  begin_tiles<2, 2>(sums, kPair, false);
  for (int64_t step = 0; step < steps; step += kFewSteps) {
    const TileLayout<1> layout{int(min_of(kFewSteps, steps - step))};
    const bool ends = step + kFewSteps >= steps;
    for (int64_t row = 0; row < kOutputs; row++) {
      job.weights.ask(first + row + (ends ? kOutputs : 0), ends ? 0 : step + kFewSteps, kFewSteps);
      job.make(made, layout, first, step, row);
    }
    for (int k = 0; k < layout.steps; k++) {
      const TileRun right = {x.first + step * kTileSize, 0, x.tile_stride};
      if constexpr (Columns == 1)
        multiply_column<Products>(run_of(made, layout, 0), right, k);
      else
        multiply_step<1, 2, 2, Products>(run_of(made, layout, 0), right, k);
    }
  }
  if constexpr (Columns == 1)
    end_column(sums);
  else
    end_tiles<2, 2>(sums, kPair);
  for (int64_t o = 0; o < min_of<int64_t>(kOutputs, job.p.out - first); o += kPair)
    for (int part = 0; part < kFinishParts / 2 * Columns; part++)
      job.finish(sums + o / kPair * kSquare, first + o, 0, part);
}

template <class T, class Products, int Columns>
const char* few_rows_on_tiles(const ForwardTiles<T>& job, const Runtime& rt) {
  const TileLayout<1> layout{int(ceil_div(job.p.in, kTileDepth))};
  Packed* x = scratch<Packed>(rt, kHeldSlot, layout.at(2, 0, 0));
  if (!x) return kOutOfMemory;
  job.pack(x, layout, 0);
  const int64_t outputs = kPanel / Columns, grain = max_of<int64_t>(1, (32 << 10) / (layout.steps * kTileDepth));
  parallel_for(rt, ceil_div(job.p.out, outputs), grain, [&](int64_t begin, int64_t end) {
    const TileScope scope;
    for (int64_t i = begin; i < end; i++)
      few_outputs<T, Products, Columns>(job, run_of(x, layout, 0), layout.steps, i * outputs);
  });
  return nullptr;
}

template <class T, class Products>
const char* nm_forward_tiles(const NmForwardParams& p, const Runtime& rt) {
  const RedoRows redo(rt, p.rows);
  if (!redo.words) return kOutOfMemory;
  const ForwardTiles<T> job{p, redo};
  const char* why = p.rows <= kTileRows ? few_rows_on_tiles<T, Products, 1>(job, rt)
                    : p.rows <= kPair   ? few_rows_on_tiles<T, Products, 2>(job, rt)
                                        : multiply_in_blocks<Products>(rt, job);
  return why ? why : redo.each([&](int64_t first, int64_t count) {
    NmForwardParams some = p;
    some.x = static_cast<const T*>(p.x) + first * p.x_stride;
    some.y = static_cast<T*>(p.y) + first * p.out;
    some.rows = count;
    return nm_forward(some, rt);
  });
}

// ---- dx: dy is the left operand, weights the right ----
// As everywhere but on vectors with many rows, a gradient that is not finite reaches its whole row of dx.

template <class T>
struct GradInputTiles {
  static constexpr bool kPanelIsLeft = false;
  const NmGradInputParams& p;
  const uint64_t* indices;  // by panels
  const Weights weights{p};

  int64_t held() const { return p.rows; }
  int64_t panel() const { return p.in; }
  int64_t terms() const { return p.out; }

  void pack(Packed* to, const TileLayout<1>& layout, int64_t first) const {
    const Bf16* dy = static_cast<const Bf16*>(p.dy);
    const int count = static_cast<int>(min_of<int64_t>(kPair, p.rows - first));
    pack_left<Bf16>(
        to, layout, [&](int i) { return dy + (first + i) * p.dy_stride; }, count, kPair, static_cast<int>(p.out));
  }
  int64_t parts(int64_t, int64_t steps) const { return weights.column_parts(steps); }
  TILEWISE_INLINE void make(Packed* to, const TileLayout<1>& layout, int64_t first, int64_t step, int64_t part) const {
    weights.expand_columns(to, layout, indices, first, step, part);
  }
  void expect(int64_t k, int64_t row, int part) const {
    T* dx = static_cast<T*>(p.dx) + (row + 4 * part) * p.in + k;
    for (int i = 0; i < 4; i++) __builtin_prefetch(dx + i * p.in, 1);
  }
  TILEWISE_INLINE void finish(const float* sums, int64_t k, int64_t row, int part) const {
    for (int i = 4 * part; i < 4 * part + 4 && row + i < p.rows; i++) {
      VF low = load(sums + i * kPair), high = load(sums + i * kPair + W);
      natural_columns<1>(low, high);
      store_rounded(static_cast<T*>(p.dx) + (row + i) * p.in + k, low, high, p.in - k);
    }
  }
};

template <class T, class Products>
const char* nm_grad_input_tiles(const NmGradInputParams& p, const Runtime& rt) {
  const uint64_t* indices = Weights(p).indices_by_panels(rt);
  return indices ? multiply_in_blocks<Products>(rt, GradInputTiles<T>{p, indices}) : kOutOfMemory;
}

// ---- dvalues: dy^T is the left operand, x the right; of each 32 results of a row the 16 kept ones are stored ----
// A result that is kept depends on nothing else, so rows need not be finite.

template <class T>
struct GradValuesTiles {
  static constexpr bool kPanelIsLeft = false;
  const NmGradValuesParams& p;

  int64_t held() const { return p.out; }
  int64_t panel() const { return p.in; }
  int64_t terms() const { return p.rows; }

  // Row `row` of a matrix from column `first` on, or null.
  const Bf16* row_of(const void* matrix, int64_t stride, int64_t row, int64_t first) const {
    return row < p.rows ? static_cast<const Bf16*>(matrix) + row * stride + first : nullptr;
  }
  void pack(Packed* to, const TileLayout<1>& layout, int64_t first) const {
    const int width = static_cast<int>(min_of<int64_t>(kPair, p.out - first));
    for (int64_t k = 0; k < layout.steps; k++, to += kTileSize) {
      for (int64_t i = 0; i < kTileRows; i++) {
        const int64_t row = k * kTileDepth + 2 * i;
        pack_row_pair(to + i * kTileDepth, layout, row_of(p.dy, p.dy_stride, row, first),
                      row_of(p.dy, p.dy_stride, row + 1, first), width);
      }
      transpose_in_memory(reinterpret_cast<float*>(to));
      transpose_in_memory(reinterpret_cast<float*>(to + layout.tile_stride()));
    }
  }
  int64_t parts(int64_t, int64_t steps) const { return steps * kTileRows; }
  TILEWISE_INLINE void make(Packed* to, const TileLayout<1>& layout, int64_t first, int64_t step, int64_t part) const {
    const int width = static_cast<int>(min_of<int64_t>(kPanel, p.in - first));
    const int64_t row = step * kTileDepth + 2 * part;
    pack_row_pair(to + part * kTileDepth, layout, row_of(p.x, p.x_stride, row, first),
                  row_of(p.x, p.x_stride, row + 1, first), width);
  }
  void expect(int64_t k, int64_t o, int part) const {
    for (int i = 4 * part; i < 4 * part + 4; i++) {
      const int64_t row = o + natural_column<1>(i);
      __builtin_prefetch(static_cast<T*>(p.dvalues) + (row * p.in + k) / 2, 1);
      __builtin_prefetch(p.indices + row * ceil_div(p.in, 8) + k / 8);
    }
  }
  TILEWISE_INLINE void finish(const float* sums, int64_t k, int64_t o, int part) const {
    const int64_t bytes = min_of<int64_t>(kPair / 8, ceil_div(p.in - k, 8)), kept = min_of<int64_t>(W, (p.in - k) / 2);
    for (int i = 4 * part; i < 4 * part + 4; i++) {
      const int64_t row = o + natural_column<1>(i);
      if (row >= p.out) continue;
      VF low = load(sums + i * kPair), high = load(sums + i * kPair + W);
      natural_columns<1>(low, high);
      uint32_t indices = 0;
      __builtin_memcpy(&indices, p.indices + row * ceil_div(p.in, 8) + k / 8, bytes);
      const uint32_t bits = _mm_cvtsi128_si32(_mm512_castsi512_si128(kept_bits(_mm512_set1_epi32(indices))));
      const Halves chosen = _mm512_maskz_compress_epi16(bits, round_to(T{}, low, high));
      _mm256_mask_storeu_epi16(static_cast<T*>(p.dvalues) + (row * p.in + k) / 2, lane_mask(kept),
                               _mm512_castsi512_si256(chosen));
    }
  }
};

}  // namespace
}  // namespace tilewise
