// 2:4 forward. Many rows: panels of x in the first-level cache, each kept value a broadcast times a line of the panel.
// Few rows: the weights are read once, and x is looked up by the indices in registers.
#pragma once
#include "sparse/cpu/panels.h"

namespace tilewise {
namespace {

constexpr int64_t kFewRows = 16;  // up to here the look-up form is faster
constexpr int kPanelVectors = 8;  // accumulators: enough to hide the latency of two FMA ports
constexpr int64_t kPanelWidth = kPanelVectors * W;
constexpr int64_t kTileColumns = 8192 / kPanelWidth;  // a tile of the panel takes 32 KB
constexpr int64_t kTileKept = kTileColumns / 2;
constexpr int64_t kRowBlock = 128;  // outputs whose sums wait in the second-level cache
constexpr int64_t kChain = 32;      // vectors that a dot product adds up before it starts again from zero

// The 2-bit indices of W kept values from `groups` groups on; `bytes` is what may be read there.
TILEWISE_INLINE VI unpack_indices(const uint8_t* indices, int64_t bytes) {
  uint32_t word = 0;
  for (int i = 0; i < W / 4; i++) word |= uint32_t(i < bytes ? indices[i] : 0) << 8 * i;
  return (VI)((VU)set1i(int32_t(word)) >> (VU)(iota() * 2)) & 3;
}
TILEWISE_INLINE VI unpack_indices(const uint8_t* indices) {
  uint32_t word = 0;
  __builtin_memcpy(&word, indices, W / 4);
  return (VI)((VU)set1i(int32_t(word)) >> (VU)(iota() * 2)) & 3;
}

// offsets[e] = `width` times the column of kept value e within a tile of `kept` values.
TILEWISE_INLINE void line_offsets(uint32_t* offsets, const uint8_t* indices, int64_t kept, int64_t width) {
  const VI group = iota() / 2 * 4;
  for (int64_t e = 0; e < kept; e += W) {
    const int64_t bytes = (kept - e + 3) / 4;
    const VI at = bytes >= W / 4 ? unpack_indices(indices + e / 4) : unpack_indices(indices + e / 4, bytes);
    store(reinterpret_cast<int32_t*>(offsets + e), (at + group + int32_t(2 * e)) * int32_t(width));
  }
}

TILEWISE_INLINE const float* as_floats(const float* v, int64_t, float*) {
  return v;
}
template <class H>
TILEWISE_INLINE const float* as_floats(const H* v, int64_t n, float* buffer) {
  for (int64_t i = 0; i < n; i += W) store(buffer + i, n - i >= W ? load(v + i) : load(v + i, n - i));
  return buffer;
}

// sums [outputs, panel] = rows o0.. of W times one panel, of which V vectors are in use.
template <class T, int V>
inline void nm_panel(const NmForwardParams& p, const float* panel, float* sums, int64_t o0, int64_t outputs) {
  const int64_t row_bytes = ceil_div(p.in, 8);
  uint32_t offsets[kTileKept + W];
  float buffer[kTileKept + W];
  for (int64_t k = 0; k < p.in; k += kTileColumns) {
    const int64_t kept = min_of(kTileColumns, p.in - k) / 2;
    for (int64_t o = 0; o < outputs; o++) {
      const float* values = as_floats(static_cast<const T*>(p.values) + ((o0 + o) * p.in + k) / 2, kept, buffer);
      line_offsets(offsets, p.indices + (o0 + o) * row_bytes + k / 8, kept, kPanelWidth);
      float* sum = sums + o * kPanelWidth;
      VF acc[V] = {};  // from zero in every tile: rounding errors grow with the length of a chain of additions
      add_lines<V>(acc, values, offsets, kept, panel + k * kPanelWidth);
#pragma GCC unroll 8
      for (int j = 0; j < V; j++) store(sum + j * W, k ? load(sum + j * W) + acc[j] : acc[j]);
    }
  }
}

template <class T>
inline void nm_panel(const NmForwardParams& p, const float* panel, float* sums, int64_t o0, int64_t outputs,
                     int64_t columns) {
  if (columns > 4 * W) return nm_panel<T, 8>(p, panel, sums, o0, outputs);
  if (columns > 2 * W) return nm_panel<T, 4>(p, panel, sums, o0, outputs);
  if (columns > W) return nm_panel<T, 2>(p, panel, sums, o0, outputs);
  nm_panel<T, 1>(p, panel, sums, o0, outputs);
}

template <class T>
const char* nm_many_rows(const NmForwardParams& p, const Runtime& rt) {
  const int64_t blocks = ceil_div(p.out, kRowBlock);
  const Panels panels(rt, p.rows, kPanelWidth, p.in, blocks);
  float* packed = scratch<float>(rt, 0, panels.per_chunk * p.in * kPanelWidth);
  if (!packed) return kOutOfMemory;
  bool exhausted = false;
  for (int64_t first = 0; first < p.rows; first += panels.per_chunk * kPanelWidth) {
    pack_panels(rt, panels, packed, static_cast<const T*>(p.x), p.x_stride, p.in, first);
    parallel_for(rt, panels.in_chunk(first) * blocks, 1, [&](int64_t begin, int64_t end) {
      float* sums = scratch<float>(rt, 1, kRowBlock * kPanelWidth);
      if (!sums) __atomic_store_n(&exhausted, true, __ATOMIC_RELAXED);
      for (int64_t i = begin; sums && i < end; i++) {
        const int64_t o = i % blocks * kRowBlock, outputs = min_of(kRowBlock, p.out - o), panel = i / blocks;
        const int64_t row = first + panel * kPanelWidth, columns = panels.valid(row);
        nm_panel<T>(p, packed + panel * p.in * kPanelWidth, sums, o, outputs, columns);
        unpack_panel(static_cast<T*>(p.y) + row * p.out + o, p.out, sums, kPanelWidth, columns, outputs,
                     p.bias ? static_cast<const T*>(p.bias) + o : nullptr);
      }
    });
  }
  return exhausted ? kOutOfMemory : nullptr;
}

// lo:hi [at]; `at` below 2 W.
TILEWISE_INLINE VF look_up(VF lo, VF hi, VI at) {
#if defined(__AVX512F__)
  return (VF)_mm512_permutex2var_ps((__m512)lo, (__m512i)at, (__m512)hi);
#elif defined(__AVX2__)
  const __m256 a = _mm256_permutevar8x32_ps((__m256)lo, (__m256i)at);
  const __m256 b = _mm256_permutevar8x32_ps((__m256)hi, (__m256i)at);
  return (VF)_mm256_blendv_ps(a, b, (__m256)(at << 28));
#else
  return __builtin_shuffle(lo, hi, at);
#endif
}

// y[.., o] for R rows of x, padded to `padded` columns.
template <class T, int R>
inline void nm_dot(const NmForwardParams& p, const float* x, int64_t padded, int64_t o, float (&y)[R]) {
  const T* values = static_cast<const T*>(p.values) + o * (p.in / 2);
  const int64_t kept = p.in / 2, row_bytes = ceil_div(p.in, 8), whole = kept / W * W;
  const uint8_t* indices = p.indices + o * row_bytes;
  const VI group = iota() / 2 * 4;
  VF acc[R] = {};
  for (int64_t e = 0; e < whole;) {
    VF chain[R] = {};
    for (const int64_t stop = min_of(whole, e + kChain * W); e < stop; e += W) {
      const VI at = unpack_indices(indices + e / 4) + group;
      const VF v = load(values + e);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
        chain[r] += v * look_up(load(x + r * padded + 2 * e), load(x + r * padded + 2 * e + W), at);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) acc[r] += chain[r];
  }
  if (whole < kept) {
    const VI at = unpack_indices(indices + whole / 4, row_bytes - whole / 4) + group;
    const VF v = load(values + whole, kept - whole);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const float* row = x + r * padded + 2 * whole;
      acc[r] += select(first_lanes(kept - whole), v * look_up(load(row), load(row + W), at), VF{});
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) y[r] = reduce_add(acc[r]);
}

// y for R rows from `first` on, of which the last may be padding.
template <class T, int R>
inline void nm_dots(const NmForwardParams& p, const float* x, int64_t padded, int64_t first, int64_t begin,
                    int64_t end) {
  T* y = static_cast<T*>(p.y) + first * p.out;
  for (int64_t o = begin; o < end; o++) {
    float dots[R];
    nm_dot<T, R>(p, x + first * padded, padded, o, dots);
    const float bias = p.bias ? to_float(static_cast<const T*>(p.bias)[o]) : 0.f;
    for (int r = 0; r < R && first + r < p.rows; r++) y[r * p.out + o] = from_float<T>(dots[r] + bias);
  }
}

template <class T>
const char* nm_few_rows(const NmForwardParams& p, const Runtime& rt) {
  const int64_t padded = round_up(p.in, 2 * W);
  float* x = scratch<float>(rt, 0, round_up(p.rows, 8) * padded + W);
  if (!x) return kOutOfMemory;
  for (int64_t r = 0; r < round_up(p.rows, 8); r++)
    for (int64_t k = 0; k < padded; k += W) {
      const T* at = static_cast<const T*>(p.x) + r * p.x_stride + k;
      store(x + r * padded + k, r >= p.rows || k >= p.in ? VF{} : p.in - k >= W ? load(at) : load(at, p.in - k));
    }
  parallel_for(rt, p.out, max_of<int64_t>(1, (32 << 10) / max_of<int64_t>(p.in, 1)), [&](int64_t begin, int64_t end) {
    constexpr int64_t kOutputs = 16;  // whose weights stay in the first-level cache for the next eight rows
    for (; begin < end; begin += kOutputs) {
      const int64_t stop = min_of(end, begin + kOutputs);
      for (int64_t first = 0; first < p.rows; first += 8) {
        const int64_t rows = p.rows - first;
        if (rows > 4)
          nm_dots<T, 8>(p, x, padded, first, begin, stop);
        else if (rows > 2)
          nm_dots<T, 4>(p, x, padded, first, begin, stop);
        else if (rows > 1)
          nm_dots<T, 2>(p, x, padded, first, begin, stop);
        else
          nm_dots<T, 1>(p, x, padded, first, begin, stop);
      }
    }
  });
  return nullptr;
}

const char* nm_forward(const NmForwardParams& p, const Runtime& rt) {
  return with_type(p.type, [&](auto t) {
    using T = decltype(t);
    return p.rows <= kFewRows || p.in == 0 ? nm_few_rows<T>(p, rt) : nm_many_rows<T>(p, rt);
  });
}

}  // namespace
}  // namespace tilewise
