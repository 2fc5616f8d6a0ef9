// CSR products, tile by tile: a tile of x stays in the first-level cache while every row of a row block passes over it.
// Within a tile the plan orders the rows by their number of entries, so the inner loop's trip count repeats and is
// predicted; empty rows are left out. Values are read where they stand, so in-place training needs no new plan.
#pragma once
#include "sparse/cpu/nm_forward.h"

namespace tilewise {
namespace {

struct CsrRecord {
  int32_t row, first, count, position;  // `position`: the sum of the counts before
};

struct CsrTiles {
  const CsrRecord* records;
  const int32_t* tile_ptr;
  const uint8_t* within;
  int64_t tile, across, blocks;  // columns per tile, tiles per row block, row blocks

  CsrTiles(const CsrTiling& t, int64_t out, int64_t in)
      : records(reinterpret_cast<const CsrRecord*>(t.records)),
        tile_ptr(t.tile_ptr),
        within(t.within),
        tile(t.tile),
        across(ceil_div(in, t.tile)),
        blocks(ceil_div(out, kCsrRowBlock)) {}
};

// The values in CSR order as f32: themselves, or a copy in `slot`; null when memory is exhausted.
template <class T>
inline const float* float_values(const CsrForwardParams& p, const Runtime& rt, int slot) {
  const T* values = static_cast<const T*>(p.values);
  if constexpr (sizeof(T) == sizeof(float))
    if (!p.order) return values;
  float* copy = scratch<float>(rt, slot, p.nnz + W);
  constexpr int64_t kGrain = 16384;
  if (copy)
    parallel_for(rt, p.nnz, kGrain, [&](int64_t begin, int64_t end) {
      if (p.order)
        for (int64_t e = begin; e < end; e++) copy[e] = to_float(values[p.order[e]]);
      else
        for (int64_t e = begin; e < end; e += W) store(copy + e, load(values + e, end - e), end - e);
    });
  return copy;
}

// acc[V] += values [n] times the lines of a tile at the columns `within` [n].
template <int V>
TILEWISE_INLINE void add_entries(VF (&acc)[V], const float* values, const uint8_t* within, int64_t n,
                                 const float* tile) {
  const auto add_entry = [&](int64_t e) {
    const float* line = tile + int64_t{within[e]} * (V * W);
    asm("" : "+r"(line));  // one register: loads that add an index do not fuse with the arithmetic
    add_line(acc, values[e], line);
  };
  int64_t e = 0;
  for (; e + 2 <= n; e += 2) {
    add_entry(e);
    add_entry(e + 1);
  }
  if (e < n) add_entry(e);
}

// What the hardware does not foresee of an array in the order of the entries: the next record's part, and this row's in
// the next tile.
TILEWISE_INLINE void prefetch_entries(const float* entries, const CsrRecord& now, const CsrRecord& next) {
  __builtin_prefetch(entries + next.first, 0, 3);
  __builtin_prefetch(entries + next.first + next.count - 1, 0, 3);
  __builtin_prefetch(entries + now.first + now.count + 16, 0, 2);
}

// sums [row block, panel] = one row block of W times one panel of V vectors.
template <int V>
inline void csr_panel(const CsrTiles& tiles, const float* values, const float* panel, float* sums, int64_t block) {
  constexpr int64_t kWidth = V * W;
  for (int64_t i = 0; i < kCsrRowBlock * V; i++) store(sums + i * W, VF{});
  for (int64_t t = 0; t < tiles.across; t++) {
    const int32_t* ptr = tiles.tile_ptr + block * tiles.across + t;
    const CsrRecord *record = tiles.records + ptr[0], *end = tiles.records + ptr[1];
    const float* lines = panel + t * tiles.tile * kWidth;
    for (; record < end; record++) {
      prefetch_entries(values, record[0], record[record + 1 < end]);
      float* sum = sums + (record->row - block * kCsrRowBlock) * kWidth;
      VF acc[V] = {};  // from zero in every tile: short chains of roundings
      add_entries(acc, values + record->first, tiles.within + record->position, record->count, lines);
#pragma GCC unroll 8
      for (int j = 0; j < V; j++) store(sum + j * W, load(sum + j * W) + acc[j]);
    }
  }
}

template <class T, int V>
const char* csr_many_rows(const CsrForwardParams& p, const Runtime& rt) {
  constexpr int64_t kWidth = V * W;
  const CsrTiles tiles(p.tiling, p.out, p.in);
  const Panels panels(rt, p.rows, kWidth, p.in, tiles.blocks);
  float* packed = scratch<float>(rt, 0, panels.per_chunk * p.in * kWidth + W);
  const float* values = float_values<T>(p, rt, 1);
  if (!packed || (p.nnz && !values)) return kOutOfMemory;
  bool exhausted = false;
  for (int64_t first = 0; first < p.rows; first += panels.per_chunk * kWidth) {
    pack_panels(rt, panels, packed, static_cast<const T*>(p.x), p.x_stride, p.in, first);
    const int64_t in_chunk = panels.in_chunk(first);
    parallel_for(rt, in_chunk * tiles.blocks, 1, [&](int64_t begin, int64_t end) {
      float* sums = scratch<float>(rt, 2, kCsrRowBlock * kWidth);
      if (!sums) __atomic_store_n(&exhausted, true, __ATOMIC_RELAXED);
      for (int64_t i = begin; sums && i < end; i++) {
        const int64_t panel = i % in_chunk, block = i / in_chunk, o = block * kCsrRowBlock;
        const int64_t row = first + panel * kWidth;
        csr_panel<V>(tiles, values, packed + panel * p.in * kWidth, sums, block);
        unpack_panel(static_cast<T*>(p.y) + row * p.out + o, p.out, sums, kWidth, panels.valid(row),
                     min_of<int64_t>(kCsrRowBlock, p.out - o), p.bias ? static_cast<const T*>(p.bias) + o : nullptr);
      }
    });
  }
  return exhausted ? kOutOfMemory : nullptr;
}

// ---- few rows: a dot product per output, x gathered by column ----
constexpr int64_t kCsrChain = 32;  // additions before a sum starts again from zero: rounding grows with their number

TILEWISE_INLINE VF gather(const float* p, VI at) {
#if defined(__AVX512F__)
  return (VF)_mm512_i32gather_ps((__m512i)at, p, 4);
#elif defined(__AVX2__)
  return (VF)_mm256_i32gather_ps(p, (__m256i)at, 4);
#else
  VF r;
  for (int i = 0; i < W; i++) r[i] = p[at[i]];
  return r;
#endif
}

// y[r] += entries [e, stop) of W times row r of x; the sum starts from zero.
template <class T, int R>
TILEWISE_INLINE void csr_dot(const CsrForwardParams& p, const float* x, int64_t e, int64_t stop, float (&y)[R]) {
  const T* values = static_cast<const T*>(p.values);
  VF acc[R] = {};
  for (; !p.order && e + W <= stop; e += W) {
    const VF v = load(values + e);
    const VI at = load(p.col + e);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) acc[r] += v * gather(x + r * p.in, at);
  }
  float rest[R] = {};
  for (; e < stop; e++) {
    const float v = to_float(values[p.order ? p.order[e] : e]);
    for (int r = 0; r < R; r++) rest[r] += v * x[r * p.in + p.col[e]];
  }
  for (int r = 0; r < R; r++) y[r] += reduce_add(acc[r]) + rest[r];
}

template <class T, int R>
inline void csr_dots(const CsrForwardParams& p, const float* x, int64_t begin, int64_t end) {
  const int64_t chain = p.order ? kCsrChain : kCsrChain * W;
  for (int64_t o = begin; o < end; o++) {
    const int64_t stop = p.crow[o + 1];
    float y[R] = {};
    for (int64_t e = p.crow[o]; e < stop; e += chain) csr_dot<T>(p, x, e, min_of(stop, e + chain), y);
    const float bias = p.bias ? to_float(static_cast<const T*>(p.bias)[o]) : 0.f;
    for (int r = 0; r < R && r < p.rows; r++) static_cast<T*>(p.y)[r * p.out + o] = from_float<T>(y[r] + bias);
  }
}

template <class T>
const char* csr_few_rows(const CsrForwardParams& p, const Runtime& rt) {
  float* x = scratch<float>(rt, 0, kFewCsrRows * p.in + W);
  if (!x) return kOutOfMemory;
  for (int64_t r = 0; r < kFewCsrRows; r++)
    for (int64_t k = 0; k < p.in; k++)
      x[r * p.in + k] = r < p.rows ? to_float(static_cast<const T*>(p.x)[r * p.x_stride + k]) : 0.f;
  const int64_t grain = max_of<int64_t>(1, 16384 * p.out / max_of<int64_t>(p.nnz, 1));
  parallel_for(rt, p.out, grain, [&](int64_t begin, int64_t end) {
    if (p.rows > 1) return csr_dots<T, 2>(p, x, begin, end);
    csr_dots<T, 1>(p, x, begin, end);
  });
  return nullptr;
}

const char* csr_forward(const CsrForwardParams& p, const Runtime& rt) {
  return with_type(p.type, [&](auto t) {
    using T = decltype(t);
    if (p.rows <= kFewCsrRows) return csr_few_rows<T>(p, rt);
    if (p.rows > 4 * W && p.tiling.tile <= 64) return csr_many_rows<T, 8>(p, rt);
    if (p.rows > 2 * W) return csr_many_rows<T, 4>(p, rt);
    return p.rows > W ? csr_many_rows<T, 2>(p, rt) : csr_many_rows<T, 1>(p, rt);
  });
}

// ---- dvalues ----
constexpr int64_t kCsrDotRows = 8 * W;

// sums [n] (+)= the products of a line of dy with a tile's lines of x at the columns `within` [n], n at most N.
template <int N>
TILEWISE_INLINE void dot_entries(float* sums, const uint8_t* within, int64_t n, const float* line, int64_t vectors,
                                 const float* tile, int64_t width, bool add) {
  uint32_t offsets[N] = {};
  for (int64_t i = 0; i < n; i++) offsets[i] = within[i] * uint32_t(width);
  const VF dots = dot_lines<N>(line, vectors, offsets, tile);
  store(sums, add ? dots + load(sums, n) : dots, n);
}

// One tile of W: sums [nnz] (+)= its entries of dy^T x.
inline void dot_tile(const CsrTiles& tiles, int64_t tile, const float* dy, const float* x, int64_t width,
                     int64_t vectors, float* sums, bool add) {
  const CsrRecord *record = tiles.records + tiles.tile_ptr[tile], *end = tiles.records + tiles.tile_ptr[tile + 1];
  const float* lines = x + tile % tiles.across * tiles.tile * width;
  for (; record < end; record++) {
    prefetch_entries(sums, record[0], record[record + 1 < end]);
    const float* line = dy + record->row * width;
    float* sum = sums + record->first;
    const uint8_t* within = tiles.within + record->position;
    int64_t e = 0;
    for (const int64_t n = record->count; e < n; e += kDots) {
      if (n - e > kDots / 2)
        dot_entries<kDots>(sum + e, within + e, min_of<int64_t>(kDots, n - e), line, vectors, lines, width, add);
      else
        dot_entries<kDots / 2>(sum + e, within + e, n - e, line, vectors, lines, width, add);
    }
  }
}

template <class T>
const char* csr_grad_values(const CsrGradValuesParams& p, const Runtime& rt) {
  const CsrTiles tiles(p.tiling, p.out, p.in);
  const int64_t width = min_of(kCsrDotRows, round_up(p.rows, W));
  if (p.rows == 0) {
    __builtin_memset(p.dvalues, 0, size_t(p.nnz) * sizeof(T));
    return nullptr;
  }
  float* dy = scratch<float>(rt, 0, p.out * width);
  float* x = scratch<float>(rt, 1, p.in * width);
  float* sums = sizeof(T) == 4 ? static_cast<float*>(p.dvalues) : scratch<float>(rt, 2, p.nnz);
  if (!dy || !x || !sums) return kOutOfMemory;
  for (int64_t first = 0; first < p.rows; first += width) {
    const int64_t rows = min_of(width, p.rows - first), vectors = ceil_div(rows, W);
    const Panels panel(rt, rows, width, 0, 1);
    pack_panels(rt, panel, dy, static_cast<const T*>(p.dy) + first * p.dy_stride, p.dy_stride, p.out, 0);
    pack_panels(rt, panel, x, static_cast<const T*>(p.x) + first * p.x_stride, p.x_stride, p.in, 0);
    parallel_for(rt, tiles.blocks * tiles.across, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) dot_tile(tiles, i, dy, x, width, vectors, sums, first);
    });
  }
  if constexpr (sizeof(T) != 4)
    for (int64_t i = 0; i < p.nnz; i += W) store(static_cast<T*>(p.dvalues) + i, load(sums + i, p.nnz - i), p.nnz - i);
  return nullptr;
}

const char* csr_grad_values(const CsrGradValuesParams& p, const Runtime& rt) {
  return with_type(p.type, [&](auto t) { return csr_grad_values<decltype(t)>(p, rt); });
}

}  // namespace
}  // namespace tilewise
