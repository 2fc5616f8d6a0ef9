// The panel form in which the products run: a matrix [rows, n] of any dtype becomes panels of `width` rows, transposed
// to f32: [n, width]. A vector's lanes are then rows, and one weight is a broadcast that meets a whole line of them.
#pragma once
#include "common/isa.h"
#include "sparse/params.h"

namespace tilewise {
namespace {

using namespace sparse;

// Calls body(T{}) with the element type.
template <class F>
TILEWISE_INLINE const char* with_type(Type type, const F& body) {
  switch (type) {
    case Type::bf16: return body(Bf16{});
    case Type::f16: return body(Fp16{});
    default: return body(0.f);
  }
}

// One stage of a butterfly: lanes whose bit `Step` is clear come from a (`even`) or from Step lanes up (`odd`), the
// others from b, Step lanes down or in place.
template <int Step>
TILEWISE_INLINE void butterfly(VF a, VF b, VF& even, VF& odd) {
  VI from_even, from_odd;
  for (int j = 0; j < W; j++) {
    from_even[j] = j & Step ? W + j - Step : j;
    from_odd[j] = j & Step ? W + j : j + Step;
  }
  even = __builtin_shuffle(a, b, from_even);
  odd = __builtin_shuffle(a, b, from_odd);
}

template <int Step = 1>
TILEWISE_INLINE void transpose(VF (&r)[W]) {
  if constexpr (Step < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
      if (!(i & Step)) butterfly<Step>(r[i], r[i + Step], r[i], r[i + Step]);
    transpose<2 * Step>(r);
  }
}

// Lane l of the result is the sum of vector l % Count (Count a power of two, at most W).
template <int Count, int Step = 1>
TILEWISE_INLINE VF sum_each(VF (&r)[Count]) {
  if constexpr (Step < W) {
#pragma GCC unroll 16
    for (int i = 0; i < Count; i += 2 * Step) {
      VF even, odd;
      butterfly<Step>(r[i], r[Step < Count ? i + Step : i], even, odd);
      r[i] = even + odd;
    }
    return sum_each<Count, 2 * Step>(r);
  }
  return r[0];
}

// dst [n, width] = the transpose of src [count, n]; columns of dst from count up to a multiple of W become zero.
template <class T>
inline void pack_panel(float* dst, int64_t width, const T* src, int64_t stride, int64_t count, int64_t begin,
                       int64_t end) {
  for (int64_t b = 0; b < count; b += W) {
    for (int64_t k = begin; k < end; k += W) {
      const int64_t n = end - k;
      VF r[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) {
        const T* at = src + (b + i) * stride + k;
        r[i] = b + i >= count ? VF{} : n >= W ? load(at) : load(at, n);
      }
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < W; i++)
        if (i < n) store(dst + (k + i) * width + b, r[i]);
    }
  }
}

// dst [count, stride] = the transpose of src [n, width] plus the bias [n]. Along the rows of dst: few pages at a time.
template <class T>
inline void unpack_panel(T* dst, int64_t stride, const float* src, int64_t width, int64_t count, int64_t n,
                         const T* bias) {
  for (int64_t b = 0; b < count; b += W) {
    for (int64_t o = 0; o < n; o += W) {
      const int64_t valid = n - o;
      const VF add = bias ? load(bias + o, valid) : VF{};
      VF r[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) r[i] = i < valid ? load(src + (o + i) * width + b) : VF{};
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) {
        T* at = dst + (b + i) * stride + o;
        if (b + i < count && valid >= W) store(at, r[i] + add);
        if (b + i < count && valid < W) store(at, r[i] + add, valid);
      }
    }
  }
}

// How a call walks over the rows: in chunks of whole panels. A chunk is packed and then used: at best it still lies in
// the second-level cache, but it must hold work for every thread.
constexpr int64_t kHotBytes = 1 << 20, kLargeBytes = 16 << 20;

struct Panels {
  int64_t rows, width, per_chunk;

  // Panels of [n, width], of each of which `tasks` can be done at once.
  Panels(const Runtime& rt, int64_t rows, int64_t width, int64_t n, int64_t tasks, int64_t bytes = kHotBytes)
      : rows(rows), width(width) {
    const int64_t fit = bytes / (4 * width * max_of<int64_t>(n, 1));
    const int64_t busy = ceil_div(4 * int64_t(rt.num_threads()), max_of<int64_t>(tasks, 1));
    per_chunk = min_of(max_of(fit, max_of<int64_t>(busy, 1)), ceil_div(rows, width));
  }
  int64_t in_chunk(int64_t first) const { return min_of(per_chunk, ceil_div(rows - first, width)); }
  int64_t valid(int64_t row) const { return min_of(width, rows - row); }
};

// dst [panels, n, width] = the panels of src from row `first` on, in parallel over panels and columns.
template <class T>
inline void pack_panels(const Runtime& rt, const Panels& panels, float* dst, const T* src, int64_t stride, int64_t n,
                        int64_t first) {
  constexpr int64_t kColumns = 256;
  const int64_t slices = ceil_div(n, kColumns);
  parallel_for(rt, panels.in_chunk(first) * slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t panel = i / slices, k = i % slices * kColumns, row = first + panel * panels.width;
      pack_panel(dst + panel * n * panels.width, panels.width, src + row * stride, stride, panels.valid(row), k,
                 min_of(n, k + kColumns));
    }
  });
}

// acc[V] += a value times a line of V vectors.
template <int V>
TILEWISE_INLINE void add_line(VF (&acc)[V], float value, const float* line) {
  const VF v = set1(value);
#pragma GCC unroll 8
  for (int j = 0; j < V; j++) acc[j] += v * load(line + j * W);
}

// acc[V] += values [n] times the lines of b at `offsets` [n].
template <int V>
TILEWISE_INLINE void add_lines(VF (&acc)[V], const float* values, const uint32_t* offsets, int64_t n, const float* b) {
  for (int64_t e = 0; e < n; e++) add_line(acc, values[e], b + offsets[e]);
}

// Lane e of the result is the product of a line of `vectors` vectors with the line of b at offsets[e]; N at most W.
constexpr int kDots = W < 8 ? W : 8;
template <int N = kDots>
TILEWISE_INLINE VF dot_lines(const float* line, int64_t vectors, const uint32_t* offsets, const float* b) {
  VF acc[N] = {};
  for (int64_t j = 0; j < vectors; j++) {
    const VF d = load(line + j * W);
#pragma GCC unroll 8
    for (int e = 0; e < N; e++) acc[e] += d * load(b + offsets[e] + j * W);
  }
  return sum_each<N>(acc);
}

}  // namespace
}  // namespace tilewise
