// Attention over a paged cache without tensor cores: one warp per query row, lanes are head dimensions. Serves float32,
// head dims other than 64 and 128, and rows that are not 16-byte aligned; arithmetic in float32 throughout.
#pragma once
#include "common/paged/cuda/attention.h"
#include "common/paged/cuda/source.h"

namespace tilewise::paged {

// Joins the key ranges: one warp per output row.
template <class T, class Visibility>
struct MergeSplits {
  static constexpr int kThreads = 128, kMinArch = 800, kWarps = kThreads / kWarp;
  using Params = Args<typename Visibility::Params>;
  struct Smem {};

  SIMT_DEVICE static void run(const Params& a, Smem&) {
    const AttentionParams& p = a.p;
    const int64_t row = (int64_t)block_idx().x * kWarps + warp_id();
    if (row >= (int64_t)p.batch * p.tokens * p.q_heads) return;
    float top = -INFINITY, total = 0.f;
    for (int s = 0; s < p.splits; s++) top = fmaxf(top, *partial_lse(p, s, row));
    const float base = top == -INFINITY ? 0.f : top;
    for (int s = 0; s < p.splits; s++) total += exp2_approx((*partial_lse(p, s, row) - base) * kLog2e);
    const float inverse = total == 0.f ? 0.f : 1.f / total;
    const int head = (int)(row % p.q_heads), token = (int)(row / p.q_heads % p.tokens);
    const int b = (int)(row / p.q_heads / p.tokens);
    T* out = static_cast<T*>(p.out) + offset(p.out_strides, b, token, head);
    for (int d = lane_id(); d < p.dim; d += kWarp) {
      float sum = 0.f;
      for (int s = 0; s < p.splits; s++) {
        const float lse = *partial_lse(p, s, row);
        if (lse != -INFINITY) sum += exp2_approx((lse - base) * kLog2e) * partial_out(p, s, row)[d];
      }
      store_float(out + d, sum * inverse);
    }
    float* to = p.lse + offset(p.lse_strides, b, token, head);
    if (lane_id() == 0) *to = total == 0.f ? -INFINITY : base + log2_approx(total) * kLn2;
  }
};

// Four keys at a time are summed from zero, so chains are a quarter as long, and their shuffles overlap.
template <class T, class Visibility, class Source = FloatSource<T>>
struct PagedAttentionRows {
  static constexpr int kThreads = 128, kMinArch = 800, kWarps = kThreads / kWarp;
  static constexpr int kKeys = 4;
  using Params = Args<typename Visibility::Params>;
  struct Smem {};

  // Of the keys so far, relative to the largest score (base 2).
  struct Running {
    float out[kPerLane] = {}, top = -INFINITY, sum = 0.f;
    float excess = 0.f;  // what rounding has added to the sum
  };

  SIMT_DEVICE static float value(const void* pages, int64_t row, int d, int dim) {
    return Source::value(static_cast<const char*>(pages) + row * Source::kItem, d, dim);
  }

  // Where keys [key, key + kKeys) and their values stand; -1: hidden.
  template <class Row>
  SIMT_DEVICE static void find(const Params& a, int b, int kv_head, int key, int end, const Row& row,
                               int64_t (&k_row)[kKeys], int64_t (&v_row)[kKeys]) {
    const AttentionParams& p = a.p;
#pragma unroll
    for (int j = 0; j < kKeys; j++) {
      const bool seen = key + j < end && row.sees(key + j);
      const Place place = seen ? place_of(p.table, b, key + j, a.fault) : Place{-1, 0};
      k_row[j] = place.page < 0 ? -1 : place.offset(p.k_strides) + kv_head * p.k_strides.head;
      v_row[j] = place.page < 0 ? -1 : place.offset(p.v_strides) + kv_head * p.v_strides.head;
    }
  }

  // The dot products of the row with keys.
  SIMT_DEVICE static void scores(const AttentionParams& p, const float (&q)[kPerLane], const int64_t (&k_row)[kKeys],
                                 float (&score)[kKeys]) {
#pragma unroll
    for (int j = 0; j < kKeys; j++) {
      score[j] = 0.f;
      if (k_row[j] < 0) continue;
#pragma unroll
      for (int i = 0; i < kPerLane; i++) {
        const int d = lane_id() + i * kWarp;
        if (d < p.dim) score[j] += q[i] * value(p.k_pages, k_row[j], d, p.dim);
      }
    }
#pragma unroll
    for (int j = 0; j < kKeys; j++) score[j] = warp_sum(score[j]);
#pragma unroll
    for (int j = 0; j < kKeys; j++)
      if (p.softcap != 0.f) score[j] = softcap(score[j], p.softcap * kLog2e);
  }

  // Where scores hardly differ, weights hardly do, and every addition to their sum is rounded alike: the error would
  // grow with the number of keys, not its root. So it is taken back with the next four (Kahan).
  SIMT_DEVICE static void add_weights(Running& r, const float (&weight)[kKeys], float shrink) {
    const float old = r.sum * shrink;
    const float four = (weight[0] + weight[1]) + (weight[2] + weight[3]) - r.excess * shrink;
    r.sum = old + four;
    r.excess = (r.sum - old) - four;
  }

  // Adds keys of these scores, and their values.
  SIMT_DEVICE static void add(Running& r, const AttentionParams& p, float (&score)[kKeys],
                              const int64_t (&v_row)[kKeys]) {
    float top = r.top, weight[kKeys], four[kPerLane] = {};
#pragma unroll
    for (int j = 0; j < kKeys; j++) {
      if (v_row[j] < 0) score[j] = -INFINITY;
      top = fmaxf(top, score[j]);
    }
    const float base = top == -INFINITY ? 0.f : top, shrink = exp2_approx(r.top - base);
    r.top = top;
#pragma unroll
    for (int j = 0; j < kKeys; j++) weight[j] = exp2_approx(score[j] - base);
    add_weights(r, weight, shrink);
#pragma unroll
    for (int j = 0; j < kKeys; j++) {
      if (v_row[j] < 0) continue;
#pragma unroll
      for (int i = 0; i < kPerLane; i++) {
        const int d = lane_id() + i * kWarp;
        if (d < p.dim) four[i] += weight[j] * value(p.v_pages, v_row[j], d, p.dim);
      }
    }
#pragma unroll
    for (int i = 0; i < kPerLane; i++) r.out[i] = r.out[i] * shrink + four[i];
  }

  SIMT_DEVICE static void run(const Params& a, Smem&) {
    const AttentionParams& p = a.p;
    const int at = (int)block_idx().x * kWarps + warp_id(), split = (int)block_idx().y, b = (int)block_idx().z;
    if (at >= p.tokens * p.q_heads) return;
    const int token = at / p.q_heads, head = at % p.q_heads, kv_head = head / (p.q_heads / p.kv_heads);
    const Visibility visible(a.p, b, token, token, a.fault);
    const auto row = visible.row(token, Visibility::words_of(a.p, b, token));
    const int keys = visible.end > visible.first ? visible.end - visible.first : 0, share = ceil_div(keys, p.splits);
    const int first = visible.first + split * share, last = first + share < visible.end ? first + share : visible.end;
    float q[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; i++) {
      const int d = lane_id() + i * kWarp;
      const int64_t from = offset(p.q_strides, b, token, head) + d;
      q[i] = d < p.dim ? load_float(static_cast<const T*>(p.q) + from) * p.scale * kLog2e : 0.f;
      if (p.k_channels && d < p.dim) q[i] *= p.k_channels[kv_head * p.dim + d];
    }
    Running running;
    for (int key = first; key < last; key += kKeys) {
      float score[kKeys];
      int64_t k_row[kKeys], v_row[kKeys];
      find(a, b, kv_head, key, last, row, k_row, v_row);
      scores(p, q, k_row, score);
      add(running, p, score, v_row);
    }
    write(p, split, b, token, head, running);
  }

  SIMT_DEVICE static void write(const AttentionParams& p, int split, int b, int token, int head, const Running& r) {
    const int64_t row = workspace_row(p, b, token, head), at = offset(p.out_strides, b, token, head);
    const float inverse = r.sum == 0.f ? 0.f : 1.f / r.sum;
#pragma unroll
    for (int i = 0; i < kPerLane; i++) {
      const int d = lane_id() + i * kWarp;
      if (d >= p.dim) continue;
      const float factor = p.v_channels ? inverse * p.v_channels[head / (p.q_heads / p.kv_heads) * p.dim + d] : inverse;
      if (p.splits > 1)
        partial_out(p, split, row)[d] = r.out[i] * factor;
      else
        store_float(static_cast<T*>(p.out) + at + d, r.out[i] * factor);
    }
    const float lse = r.sum == 0.f ? -INFINITY : (r.top + log2_approx(r.sum)) * kLn2;
    if (lane_id() == 0)
      *(p.splits > 1 ? partial_lse(p, split, row) : p.lse + offset(p.lse_strides, b, token, head)) = lse;
  }
};

}  // namespace tilewise::paged
