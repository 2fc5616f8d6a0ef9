// Writing a cache: new keys, rotated on the way in, and values; or keys that stand there already, rotated further. One
// warp writes one row of a token and head; lanes are channels.
#pragma once
#include "attention/params.h"
#include "common/paged/cuda/source.h"

namespace tilewise::attention {

using namespace simt;

template <class T, class Source>
struct CacheWrite {
  static constexpr int kThreads = 128, kMinArch = 800, kWarps = kThreads / kWarp, kPerLane = paged::kPerLane;
  struct Params {
    CacheWriteParams p;
    uint32_t* fault;
  };
  struct Smem {
    paged::RowCodes rows[kWarps];
  };

  SIMT_DEVICE static const float* of_head(const float* channels, int head, int dim) {
    return channels ? channels + (int64_t)head * dim : nullptr;
  }

  // Channel d of what is read, rotated (RoPE, Su et al., arXiv:2104.09864).
  template <class Read>
  SIMT_DEVICE static float rotated(const CacheWriteParams& p, int64_t angles, int d, const Read& read) {
    if (d >= p.rotary) return read(d);
    const int half = p.rotary / 2, i = p.interleaved ? d / 2 : d % half;
    const bool first = p.interleaved ? d % 2 == 0 : d < half;
    const int partner = p.interleaved ? d ^ 1 : first ? d + half : d - half;
    const float turned = read(partner) * p.sin[angles + i];
    return read(d) * p.cos[angles + i] + (first ? -turned : turned);
  }

  template <class Read>
  SIMT_DEVICE static void write(const CacheWriteParams& p, char* row, const float* channels, const Read& read,
                                paged::RowCodes& s) {
    float x[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; i++) {
      const int d = lane_id() + i * kWarp;
      x[i] = d < p.dim ? read(d) : 0.f;
      if (channels && d < p.dim) x[i] /= channels[d];
    }
    sync_warp();  // all has been read that is overwritten
    Source::store(x, row, p.dim, s);
  }

  SIMT_DEVICE static void run(const Params& q, Smem& s) {
    const CacheWriteParams& p = q.p;
    const int at = (int)block_idx().x * kWarps + warp_id(), b = (int)block_idx().z;
    if (at >= p.tokens * p.kv_heads) return;
    const int i = at / p.kv_heads, head = at % p.kv_heads;
    const int64_t position = p.positions ? p.positions[(int64_t)b * p.tokens + i] : (int64_t)p.start[b] + i;
    const int64_t slot = paged::slot_of(p.table, b, position, q.fault);
    if (slot < 0) return;
    const auto row_of = [&](void* pages, const paged::PageStrides& strides) {
      const int64_t offset = paged::slot_offset(slot, p.table.page_size, strides) + head * strides.head;
      return static_cast<char*>(pages) + offset * Source::kItem;
    };
    const auto input = [&](const void* from, const paged::TokenStrides& strides) {
      return static_cast<const T*>(from) + b * strides.batch + i * strides.token + head * strides.head;
    };
    char* row = row_of(p.k_pages, p.k_strides);
    const float* channels = of_head(p.k_channels, head, p.dim);
    const T* k = p.k ? input(p.k, p.k_input) : nullptr;
    const auto key = [&](int d) {
      if (k) return paged::load_float(k + d);
      const float value = Source::value(row, d, p.dim);
      return channels ? value * channels[d] : value;
    };
    const int64_t angles = b * p.rotary_batch + i * (p.rotary / 2);
    write(p, row, channels, [&](int d) { return rotated(p, angles, d, key); }, s.rows[warp_id()]);
    if (!p.v_pages) return;
    const T* v = input(p.v, p.v_input);
    write(
        p, row_of(p.v_pages, p.v_strides), of_head(p.v_channels, head, p.dim),
        [&](int d) { return paged::load_float(v + d); }, s.rows[warp_id()]);
  }
};

}  // namespace tilewise::attention
