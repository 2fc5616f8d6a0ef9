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

template <class T, class Visibility, class Source = FloatSource<T>>
struct PagedAttentionRows {
  static constexpr int kThreads = 128, kMinArch = 800, kWarps = kThreads / kWarp;
  static constexpr int kKeys = 4;  // in flight
  using Params = Args<typename Visibility::Params>;
  struct Smem {};

  SIMT_DEVICE static float value(const void* pages, int64_t row, int d, int dim) {
    return Source::value(static_cast<const char*>(pages) + row * Source::kItem, d, dim);
  }

  // The dot products of the row with keys [key, key + kKeys), hidden keys at -inf, and the rows of their values.
  template <class Row>
  SIMT_DEVICE static void scores(const Params& a, int b, int kv_head, int key, int end, const Row& row,
                                 const float (&q)[kPerLane], float (&score)[kKeys], int64_t (&v_row)[kKeys]) {
    const AttentionParams& p = a.p;
#pragma unroll
    for (int j = 0; j < kKeys; j++) {
      const bool seen = key + j < end && row.sees(key + j);
      const int64_t slot = seen ? slot_of(p.table, b, key + j, a.fault) : -1;
      v_row[j] = slot < 0 ? -1 : slot_offset(slot, p.table.page_size, p.v_strides) + kv_head * p.v_strides.head;
      score[j] = 0.f;
      if (slot >= 0) {
        const int64_t k_row = slot_offset(slot, p.table.page_size, p.k_strides) + kv_head * p.k_strides.head;
#pragma unroll
        for (int i = 0; i < kPerLane; i++) {
          const int d = lane_id() + i * kWarp;
          if (d < p.dim) score[j] += q[i] * value(p.k_pages, k_row, d, p.dim);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kKeys; j++) {
      score[j] = warp_sum(score[j]);
      if (p.softcap != 0.f) score[j] = softcap(score[j], p.softcap * kLog2e);
      if (v_row[j] < 0) score[j] = -INFINITY;
    }
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
    float q[kPerLane], out[kPerLane] = {}, top = -INFINITY, sum = 0.f;
#pragma unroll
    for (int i = 0; i < kPerLane; i++) {
      const int d = lane_id() + i * kWarp;
      const int64_t from = offset(p.q_strides, b, token, head) + d;
      q[i] = d < p.dim ? load_float(static_cast<const T*>(p.q) + from) * p.scale * kLog2e : 0.f;
      if (p.k_channels && d < p.dim) q[i] *= p.k_channels[kv_head * p.dim + d];
    }
    for (int key = first; key < last; key += kKeys) {
      float score[kKeys];
      int64_t v_row[kKeys];
      scores(a, b, kv_head, key, last, row, q, score, v_row);
      float next = top;
#pragma unroll
      for (int j = 0; j < kKeys; j++) next = fmaxf(next, score[j]);
      const float base = next == -INFINITY ? 0.f : next, shrink = exp2_approx(top - base);
      top = next;
      sum *= shrink;
#pragma unroll
      for (int i = 0; i < kPerLane; i++) out[i] *= shrink;
#pragma unroll
      for (int j = 0; j < kKeys; j++) {
        const float weight = exp2_approx(score[j] - base);
        sum += weight;
        if (v_row[j] < 0) continue;
#pragma unroll
        for (int i = 0; i < kPerLane; i++) {
          const int d = lane_id() + i * kWarp;
          if (d < p.dim) out[i] += weight * value(p.v_pages, v_row[j], d, p.dim);
        }
      }
    }
    write(p, split, b, token, head, out, top, sum);
  }

  SIMT_DEVICE static void write(const AttentionParams& p, int split, int b, int token, int head,
                                const float (&out)[kPerLane], float top, float sum) {
    const int64_t row = workspace_row(p, b, token, head), at = offset(p.out_strides, b, token, head);
    const float inverse = sum == 0.f ? 0.f : 1.f / sum;
#pragma unroll
    for (int i = 0; i < kPerLane; i++) {
      const int d = lane_id() + i * kWarp;
      if (d >= p.dim) continue;
      const float factor = p.v_channels ? inverse * p.v_channels[head / (p.q_heads / p.kv_heads) * p.dim + d] : inverse;
      if (p.splits > 1)
        partial_out(p, split, row)[d] = out[i] * factor;
      else
        store_float(static_cast<T*>(p.out) + at + d, out[i] * factor);
    }
    const float lse = sum == 0.f ? -INFINITY : (top + log2_approx(sum)) * kLn2;
    if (lane_id() == 0)
      *(p.splits > 1 ? partial_lse(p, split, row) : p.lse + offset(p.lse_strides, b, token, head)) = lse;
  }
};

}  // namespace tilewise::paged
