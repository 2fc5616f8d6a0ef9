// A thread's share of a row in global memory: gated, scaled into fp16 on the way in, gated and rounded on the way out.
#pragma once
#include "fft_conv/cuda/kernel_params.h"

namespace tilewise::fft_conv {

// V consecutive 16-bit elements.
template <int V>
struct Words {
  uint32_t w[V / 2];
};

template <int V>
SIMT_DEVICE Words<V> load_vector(const void* p) {
  Words<V> r;
  if constexpr (V == 8) {
    const uint4 q = load16(p);
    r.w[0] = q.x, r.w[1] = q.y, r.w[2] = q.z, r.w[3] = q.w;
  } else if constexpr (V == 4) {
    const uint2 q = load8(p);
    r.w[0] = q.x, r.w[1] = q.y;
  } else {
    r.w[0] = load4(p);
  }
  return r;
}

template <int V>
SIMT_DEVICE void store_vector(void* p, const Words<V>& r) {
  if constexpr (V == 8) {
    store16(p, uint4{r.w[0], r.w[1], r.w[2], r.w[3]});
  } else if constexpr (V == 4) {
    store8(p, uint2{r.w[0], r.w[1]});
  } else {
    store4(p, r.w[0]);
  }
}

template <class T, int V>
SIMT_DEVICE float element(const Words<V>& r, int i) {
  return to_f32(T{static_cast<uint16_t>(r.w[i / 2] >> (16 * (i & 1)))});
}

// How far rows go and how they may be read.
struct Extent {
  int length;
  bool vector;
};

// A thread's groups of consecutive elements: `At` has the thread's base and the constant offset(g) of group g, so that
// all groups of a row share one address register.
struct SingleGroup {
  int base;
  SIMT_HD static constexpr int offset(int) { return 0; }
};

// w[g] = the V elements of the row at group first + g; zeros from the end of the row on. All loads go out before the
// first is used: one branch, around all of them.
template <int V, int G, class T, class At>
SIMT_DEVICE void load_groups(Words<V> (&w)[G], const T* row, const Extent& extent, const At& at, int first = 0) {
  const T* from = row + at.base;
  const int left = extent.length - at.base;
  if (extent.vector) {
#pragma unroll
    for (int g = 0; g < G; g++) {
      const int offset = At::offset(first + g);
      w[g] = {};
      if (offset < left) w[g] = load_vector<V>(from + offset);
    }
  } else {
#pragma unroll
    for (int g = 0; g < G; g++) {
      if (g % 4 == 0) sync_warp();  // for the compiler: a few loads on their way will do here, registers are short
      w[g] = {};
#pragma unroll
      for (int i = 0; i < V; i++) {
        const int offset = At::offset(first + g) + i;
        if (offset < left) w[g].w[i / 2] |= static_cast<uint32_t>(from[offset].bits) << (16 * (i & 1));
      }
    }
  }
}

template <class T, int V, class At>
SIMT_DEVICE void store_group(const float (&v)[V], T* row, const Extent& extent, const At& at, int group) {
  Words<V> w;
#pragma unroll
  for (int i = 0; i < V / 2; i++) w.w[i] = pack2<T>(v[2 * i], v[2 * i + 1]);
  T* to = row + at.base;
  const int left = extent.length - at.base;
  if (extent.vector) {
    if (At::offset(group) < left) store_vector<V>(to + At::offset(group), w);
  } else {
#pragma unroll
    for (int i = 0; i < V; i++)
      if (At::offset(group) + i < left)
        to[At::offset(group) + i].bits = static_cast<uint16_t>(w.w[i / 2] >> (16 * (i & 1)));
  }
}

// v[g][i] = row * gate; a null gate is 1.
template <int V, int G, class T, class At>
SIMT_DEVICE void load_gated(float (&v)[G][V], const T* row, const T* gate, const Extent& extent, const At& at,
                            int first = 0) {
  Words<V> w[G], q[G];
  load_groups<V>(w, row, extent, at, first);
  if (gate) load_groups<V>(q, gate, extent, at, first);
#pragma unroll
  for (int g = 0; g < G; g++)
#pragma unroll
    for (int i = 0; i < V; i++) v[g][i] = element<T>(w[g], i);
  if (!gate) return;
#pragma unroll
  for (int g = 0; g < G; g++)
#pragma unroll
    for (int i = 0; i < V; i++) v[g][i] *= element<T>(q[g], i);
}

template <int V, int G>
SIMT_DEVICE float max_abs(const float (&v)[G][V]) {
  float m = 0.f;
#pragma unroll
  for (int g = 0; g < G; g++)
#pragma unroll
    for (int i = 0; i < V; i++) m = fmaxf(m, fabsf(v[g][i]));
  return m;
}

// A power of two s with s * amax < 2^top, within a factor of two of it; at most 2^64, so that products of scales stay
// finite for rows of zeros. Infinity stays infinite.
SIMT_DEVICE float scale_below(float amax, int top) {
  constexpr int kLargest = 127 + 64;
  const int field = top + 253 - static_cast<int>(f32_bits(amax) >> 23);  // amax < 2^(its exponent field - 126)
  return bits_f32(static_cast<uint32_t>(field < 1 ? 1 : field > kLargest ? kLargest : field) << 23);
}
// Of a power of two.
SIMT_DEVICE float reciprocal(float s) {
  return bits_f32((254u << 23) - f32_bits(s));
}

// Rows of n elements below 2^row_top keep every intermediate value of a unitary transform below 2^15: those are bounded
// by the row's l2 norm.
constexpr int row_top(int n) {
  int half_bits = 0;
  while ((int64_t{1} << 2 * half_bits) < n) half_bits++;
  return 15 - half_bits;
}

// x[a][h][i] = the pair of groups 2 (2 a + h) and 2 (2 a + h) + 1 at i, in fp16: a B operand of the first factor.
template <int A, int J>
SIMT_DEVICE void pack_operand(uint32_t (&x)[A][2][J], const float (&v)[4 * A][J], float scale) {
#pragma unroll
  for (int a = 0; a < A; a++)
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int i = 0; i < J; i++)
        x[a][h][i] = pack2<fp16>(v[4 * a + 2 * h][i] * scale, v[4 * a + 2 * h + 1][i] * scale);
}

// The last steps of a row, on accumulators that a thread sees as G groups of V consecutive elements: value(g, i) is a
// reference. Row addresses are computed where they are needed: registers are scarce.
template <class T>
struct RowEnd {
  const ConvParams<T>& p;
  int b, h;
  float in_scale;  // the accumulators are z * in_scale / spectrum_scale

  SIMT_DEVICE Extent extent() const { return {p.length, p.vector}; }

  template <int V, int G, class At, class Value>
  SIMT_DEVICE void add_skip(const At& at, Value value) const {
    // Groups at a time: few registers, yet several loads on their way.
    constexpr int kBatch = 16 / V < G ? 16 / V : G;
    static_assert(V <= 16 && G % kBatch == 0, "whole batches");
    if (!p.skip) return;
    const float skip = p.skip[h] * in_scale * reciprocal(p.spectrum_scale[h]);
#pragma unroll
    for (int first = 0; first < G; first += kBatch) {
      float v[kBatch][V];
      load_gated(v, p.in.row(b, h), p.in_gate.row(b, h), extent(), at, first);
#pragma unroll
      for (int g = 0; g < kBatch; g++)
#pragma unroll
        for (int i = 0; i < V; i++) value(first + g, i) += skip * v[g][i];
    }
  }

  template <int V, int G, class At>
  SIMT_DEVICE void load_gates(Words<V> (&gates)[G], const At& at) const {
    if (p.gate[0].data) load_groups<V>(gates, p.gate[0].row(b, h), extent(), at);
  }

  // add_dot receives the sums of v gate[0] gate[1].
  template <int V, int G, class At, class Value, class AddDot>
  SIMT_DEVICE void store(const Words<V> (&gates)[G], const At& at, Value value, AddDot add_dot) const {
    const float scale = p.spectrum_scale[h] * reciprocal(in_scale);
#pragma unroll
    for (int g = 0; g < G; g++) {
      float z[V], y[V];
#pragma unroll
      for (int i = 0; i < V; i++) {
        z[i] = value(g, i) * scale;
        y[i] = p.gate[0].data ? z[i] * element<T>(gates[g], i) : z[i];
      }
      if (p.out[0].data) store_group<T>(y, p.out[0].row(b, h), extent(), at, g);
      if (p.gate[1].data) store_second<V>(z, gates[g], {at.base + At::offset(g)}, add_dot);
    }
  }

  template <int V, class AddDot>
  SIMT_DEVICE void store_second(const float (&z)[V], const Words<V>& first, const SingleGroup& at,
                                AddDot add_dot) const {
    Words<V> second[1];
    load_groups<V>(second, p.gate[1].row(b, h), extent(), at);
    if (p.out[1].data) {
      float y[V];
#pragma unroll
      for (int i = 0; i < V; i++) y[i] = z[i] * element<T>(second[0], i);
      store_group<T>(y, p.out[1].row(b, h), extent(), at, 0);
    }
    if (!p.dots) return;
    float v[1][V], dot = 0.f;
    load_gated(v, p.in.row(b, h), p.in_gate.row(b, h), extent(), at);
#pragma unroll
    for (int i = 0; i < V; i++) {
      const float w = v[0][i] * element<T>(second[0], i);
      dot += p.gate[0].data ? w * element<T>(first, i) : w;
    }
    add_dot(dot);
  }
};

}  // namespace tilewise::fft_conv
