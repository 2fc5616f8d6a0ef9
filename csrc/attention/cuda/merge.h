// Joining partial results, and rotary embeddings: memory-bound, one warp per row, 16 bytes a lane where rows allow it.
#pragma once
#include "attention/cuda/sequence.h"

namespace tilewise::attention {

// V neighbouring values of a row, as floats.
template <class T, int V>
SIMT_DEVICE void load_values(float (&to)[V], const T* from) {
  if constexpr (V * sizeof(T) == 16) {
    const uint4 raw = load16(from);
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int w = 0; w < 4; w++) {
      if constexpr (is_same_v<T, float>) {
        to[w] = bits_f32(words[w]);
      } else {
        const float2 pair = unpack2<T>(words[w]);
        to[2 * w] = pair.x;
        to[2 * w + 1] = pair.y;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; i++) to[i] = to_float(from[i]);
  }
}
template <class T, int V>
SIMT_DEVICE void store_values(T* to, const float (&from)[V]) {
  if constexpr (V * sizeof(T) == 16) {
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; w++) {
      if constexpr (is_same_v<T, float>)
        words[w] = f32_bits(from[w]);
      else
        words[w] = pack2<T>(from[2 * w], from[2 * w + 1]);
    }
    store16(to, uint4{words[0], words[1], words[2], words[3]});
  } else {
#pragma unroll
    for (int i = 0; i < V; i++) to[i] = from_float<T>(from[i]);
  }
}

// The warp's row of [b, h, s], or none past the end.
struct MergeRow {
  int64_t at;
  int batch, head, row;

  SIMT_DEVICE static MergeRow find(int64_t batch, int heads, int rows, int warps) {
    const int64_t at = static_cast<int64_t>(block_idx().x) * warps + warp_id();
    return {at < batch * heads * rows ? at : -1, static_cast<int>(at / rows / heads),
            static_cast<int>(at / rows % heads), static_cast<int>(at % rows)};
  }
};

// Lane i holds the weight of part i. Returns the row's lse.
SIMT_DEVICE float merge_weight(const MergeParams& p, int64_t at, float& weight) {
  const float lse = lane_id() < p.parts ? p.lses[lane_id()][at] : -INFINITY;
  const float largest = warp_max(lse);
  const bool blind = largest == -INFINITY;  // no part saw a key
  weight = blind || lse == -INFINITY ? 0.f : exp2_approx((lse - largest) * kLog2e);
  const float sum = warp_sum(weight);
  weight = blind ? 0.f : weight / sum;
  return blind ? -INFINITY : largest + log2_approx(sum) * kLn2;
}

template <class T, int V>
struct Merge {
  static constexpr int kMinArch = 800, kThreads = 128, kWarps = kThreads / kWarp;
  using Params = MergeParams;
  struct Smem {};

  SIMT_DEVICE static void run(const Params& p, Smem&) {
    const MergeRow r = MergeRow::find(p.batch, p.heads, p.rows, kWarps);
    if (r.at < 0) return;
    float weight;
    const float lse = merge_weight(p, r.at, weight);
    if (lane_id() == 0) p.lse[r.at] = lse;
    T* out = row_pointer<T>(p.out, p.out_strides, r.batch, r.head, r.row);
    for (int first = 0; first < p.dim; first += kWarp * V) {
      const int d = first + lane_id() * V;
      float sum[V] = {};
      for (int i = 0; i < p.parts; i++) {
        const float w = shfl(weight, i);
        if (w == 0.f || d >= p.dim) continue;
        float x[V];
        load_values(x, row_pointer<T>(p.outs[i], p.outs_strides[i], r.batch, r.head, r.row) + d);
#pragma unroll
        for (int e = 0; e < V; e++) sum[e] = fmaf(w, x[e], sum[e]);
      }
      if (d < p.dim) store_values(out + d, sum);
    }
  }
};

template <class T, int V>
struct MergeBackward {
  static constexpr int kMinArch = 800, kThreads = 128, kWarps = kThreads / kWarp;
  using Params = MergeBackwardParams;
  struct Smem {};

  SIMT_DEVICE static void run(const Params& b, Smem&) {
    const MergeParams& p = b.forward;
    const MergeRow r = MergeRow::find(p.batch, p.heads, p.rows, kWarps);
    if (r.at < 0) return;
    float weight, own = 0.f;  // own: dout . outs[lane]
    merge_weight(p, r.at, weight);
    const T* dout = row_pointer<T>(b.dout, b.dout_strides, r.batch, r.head, r.row);
    for (int i = 0; i < p.parts; i++) {
      const float w = shfl(weight, i), dot = warp_sum(scale_part(b, r, dout, i, w));
      if (lane_id() == i) own = dot;
    }
    const float joined = warp_sum(weight * own);
    if (lane_id() < p.parts) b.dlses[lane_id()][r.at] = weight == 0.f ? 0.f : weight * (own - joined + b.dlse[r.at]);
  }

  // Writes douts[i] = w dout; returns this lane's share of dout . outs[i], 0 for a part without weight.
  SIMT_DEVICE static float scale_part(const Params& b, const MergeRow& r, const T* dout, int i, float w) {
    const MergeParams& p = b.forward;
    const T* part = row_pointer<T>(p.outs[i], p.outs_strides[i], r.batch, r.head, r.row);
    T* to = row_pointer<T>(b.douts[i], b.douts_strides[i], r.batch, r.head, r.row);
    float dot = 0.f;
    for (int d = lane_id() * V; d < p.dim; d += kWarp * V) {
      float g[V], x[V];
      load_values(g, dout + d);
      load_values(x, part + d);
#pragma unroll
      for (int e = 0; e < V; e++) {
        if (w != 0.f) dot = fmaf(g[e], x[e], dot);
        g[e] *= w;
      }
      store_values(to + d, g);
    }
    return dot;
  }
};

// One lane per pair; pairs of a row are neighbours, so lanes read neighbouring values.
template <class T>
struct Rope {
  static constexpr int kMinArch = 800, kThreads = 128, kWarps = kThreads / kWarp;
  using Params = RopeParams;
  struct Smem {};

  SIMT_DEVICE static void run(const Params& p, Smem&) {
    const MergeRow r = MergeRow::find(p.batch, p.heads, p.rows, kWarps);
    if (r.at < 0) return;
    const T* x = row_pointer<T>(p.x, p.x_strides, r.batch, r.head, r.row);
    T* out = row_pointer<T>(p.out, p.out_strides, r.batch, r.head, r.row);
    const int64_t table = r.batch * p.table_batch + r.row * p.table_row;
    for (int i = lane_id(); i < p.pairs; i += kWarp) {
      const int first = p.interleaved ? 2 * i : i, second = p.interleaved ? 2 * i + 1 : i + p.pairs;
      const float c = p.cos[table + i], s = p.inverse ? -p.sin[table + i] : p.sin[table + i];
      const float x0 = to_float(x[first]), x1 = to_float(x[second]);
      out[first] = from_float<T>(x0 * c - x1 * s);
      out[second] = from_float<T>(x1 * c + x0 * s);
    }
    if (out != x)
      for (int d = 2 * p.pairs + lane_id(); d < p.dim; d += kWarp) out[d] = x[d];
  }
};

}  // namespace tilewise::attention
