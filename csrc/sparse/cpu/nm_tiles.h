// 2:4 on AMX tiles, for bf16 and (where tiles multiply it) fp16: weights are expanded, zeros included, on their way
// into tiles, which costs a fifth of one product with 256 rows.
//
// A tile multiplies the zeros too, and zero times infinity is NaN. Rows that are not finite are therefore left to the
// vectors, which ignore what no weight was kept for; the other rows are as they would be without them.
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

  // Rows as those of a left operand: 64 of them at most, terms [step, step + steps).
  void expand_rows(Packed* to, const TileLayout<1>& layout, int64_t first, int64_t rows, int64_t step,
                   int64_t steps) const {
    constexpr int64_t kChunk = 64 / 4;  // steps whose indices are one vector
    for (int64_t i = 0; i < rows; i++) {
      const Bf16* v = values + (first + i) * (in / 2);
      const uint8_t* bytes = indices + (first + i) * ceil_div(in, 8);
      Packed* row = to + layout.at(i / kTileRows, 0, 0) + i % kTileRows * kTileDepth;
      for (int64_t k = 0; k < steps; k += kChunk) {
        const int64_t at = step + k, chunk = min_of(kChunk, steps - k), left = ceil_div(in, 8) - 4 * at;
        alignas(64) uint32_t bits[kChunk];
        const __mmask64 there = left >= 64 ? ~0ull : (1ull << left) - 1;
        _mm512_store_si512(bits, kept_bits(_mm512_maskz_loadu_epi8(there, bytes + 4 * at)));
        for (int64_t s = 0; s < chunk; s++)
          _mm512_store_si512(row + (k + s) * kTileSize,
                             expand(v + kTileRows * (at + s), in / 2 - kTileRows * (at + s), bits[s]));
      }
    }
    for (int64_t i = rows; i < round_up(rows, kPair); i++)
      for (int64_t k = 0; k < steps; k++)
        _mm512_store_si512(to + layout.at(i / kTileRows, 0, k) + i % kTileRows * kTileDepth, Halves{});
  }

  // Those of 64 inputs of a row, as far as there are any.
  uint64_t indices_of(int64_t row, int64_t first) const {
    const int64_t bytes = ceil_div(in, 8);
    uint64_t eight = 0;
    if (row >= out) return eight;
    const uint8_t* at = indices + row * bytes + first / 8;
    if (bytes - first / 8 >= 8)
      __builtin_memcpy(&eight, at, 8);
    else
      __builtin_memcpy(&eight, at, bytes - first / 8);
    return eight;
  }

  // Columns as those of a right operand, in the order of pack_row_pair(): 64 of them, terms are rows.
  void expand_columns(Packed* to, const TileLayout<1>& layout, int64_t first, int64_t step, int64_t steps) const {
    for (int64_t k = 0; k < steps; k++)
      for (int64_t i = 0; i < kTileRows; i++) {
        const int64_t row = (step + k) * kTileDepth + 2 * i;
        const __m128i both = _mm_set_epi64x(int64_t(indices_of(row + 1, first)), int64_t(indices_of(row, first)));
        alignas(64) uint32_t bits[16];
        _mm512_store_si512(bits, kept_bits(_mm512_zextsi128_si512(both)));
        for (int64_t c = 0; c < kPanel && first + c < in; c += kPair) {
          Halves rows[2] = {};
          for (int r = 0; r < 2 && row + r < out; r++)
            rows[r] = expand(values + ((row + r) * in + first + c) / 2, (in - first - c) / 2, bits[2 * r + c / kPair]);
          Packed* at = to + layout.at(c / kTileRows, 0, k) + i * kTileDepth;
          _mm512_store_si512(at, _mm512_unpacklo_epi16(rows[0], rows[1]));
          _mm512_store_si512(at + layout.tile_stride(), _mm512_unpackhi_epi16(rows[0], rows[1]));
        }
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
  void make(Packed* to, const TileLayout<1>& layout, int64_t first, int64_t step, int64_t steps) const {
    weights.expand_rows(to, layout, first, min_of<int64_t>(kPanel, p.out - first), step, steps);
  }
  void finish(const float* sums, int64_t o, int64_t row) const {
    const int64_t outputs = p.out - o, rows = p.rows - row;
    const T* b = static_cast<const T*>(p.bias);
    const VF bias[2] = {b ? load_up_to(b + o, outputs) : VF{}, b ? load_up_to(b + o + W, outputs - W) : VF{}};
    T* y = static_cast<T*>(p.y) + row * p.out + o;
    for (int64_t c = 0; c < min_of<int64_t>(kPair, rows); c += 4) {
      VF low[4], high[4];
      load_columns([&](int i) { return sums + i * kPair; }, static_cast<int>(c / 4), low);
      load_columns([&](int i) { return sums + (kTileRows + i) * kPair; }, static_cast<int>(c / 4), high);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++)
        if (c + i < rows) store_rounded(y + (c + i) * p.out, low[i] + bias[0], high[i] + bias[1], outputs);
    }
  }
};

template <class T, class Products>
const char* nm_forward_tiles(const NmForwardParams& p, const Runtime& rt) {
  const RedoRows redo(rt, p.rows);
  if (!redo.words) return kOutOfMemory;
  const char* why = multiply_in_blocks<Products>(rt, ForwardTiles<T>{p, redo});
  return why ? why : redo.each([&](int64_t first, int64_t count) {
    NmForwardParams some = p;
    some.x = static_cast<const T*>(p.x) + first * p.x_stride;
    some.y = static_cast<T*>(p.y) + first * p.out;
    some.rows = count;
    return nm_forward(some, rt);
  });
}

// ---- dx: dy is the left operand, weights the right ----

template <class T>
struct GradInputTiles {
  static constexpr bool kPanelIsLeft = false;
  const NmGradInputParams& p;
  const RedoRows& redo;
  const Weights weights{p};

  int64_t held() const { return p.rows; }
  int64_t panel() const { return p.in; }
  int64_t terms() const { return p.out; }

  void pack(Packed* to, const TileLayout<1>& layout, int64_t first) const {
    const Bf16* dy = static_cast<const Bf16*>(p.dy);
    redo.look(static_cast<const T*>(p.dy), p.dy_stride, first, p.out);
    const int count = static_cast<int>(min_of<int64_t>(kPair, p.rows - first));
    pack_left<Bf16>(
        to, layout, [&](int i) { return dy + (first + i) * p.dy_stride; }, count, kPair, static_cast<int>(p.out));
  }
  void make(Packed* to, const TileLayout<1>& layout, int64_t first, int64_t step, int64_t steps) const {
    weights.expand_columns(to, layout, first, step, steps);
  }
  void finish(const float* sums, int64_t k, int64_t row) const {
    T* dx = static_cast<T*>(p.dx) + row * p.in + k;
    for (int64_t i = 0; i < min_of<int64_t>(kPair, p.rows - row); i++) {
      VF low = load(sums + i * kPair), high = load(sums + i * kPair + W);
      natural_columns<1>(low, high);
      store_rounded(dx + i * p.in, low, high, p.in - k);
    }
  }
};

template <class T, class Products>
const char* nm_grad_input_tiles(const NmGradInputParams& p, const Runtime& rt) {
  const RedoRows redo(rt, p.rows);
  if (!redo.words) return kOutOfMemory;
  const char* why = multiply_in_blocks<Products>(rt, GradInputTiles<T>{p, redo});
  return why ? why : redo.each([&](int64_t first, int64_t count) {
    NmGradInputParams some = p;
    some.dy = static_cast<const T*>(p.dy) + first * p.dy_stride;
    some.dx = static_cast<T*>(p.dx) + first * p.in;
    some.rows = count;
    return nm_grad_input(some, rt);
  });
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
  void make(Packed* to, const TileLayout<1>& layout, int64_t first, int64_t step, int64_t steps) const {
    const int width = static_cast<int>(min_of<int64_t>(kPanel, p.in - first));
    for (int64_t k = 0; k < steps; k++)
      for (int64_t i = 0; i < kTileRows; i++) {
        const int64_t row = (step + k) * kTileDepth + 2 * i;
        pack_row_pair(to + layout.at(0, 0, k) + i * kTileDepth, layout, row_of(p.x, p.x_stride, row, first),
                      row_of(p.x, p.x_stride, row + 1, first), width);
      }
  }
  void finish(const float* sums, int64_t k, int64_t o) const {
    const int64_t bytes = min_of<int64_t>(kPair / 8, ceil_div(p.in - k, 8)), kept = min_of<int64_t>(W, (p.in - k) / 2);
    for (int i = 0; i < kPair; i++) {
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
