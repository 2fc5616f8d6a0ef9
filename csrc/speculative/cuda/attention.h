// Tree attention on the tensor cores (sm_80 mma.sync), in the manner of flash decoding: the nodes and heads that share
// a key head are the rows of one tile, so K and V are read once for all of them; blocks share out the keys, and merge.h
// joins their results. Key tiles are gathered through the block table with cp.async, double-buffered.
#pragma once
#include "speculative/cuda/faults.h"

namespace tilewise::speculative {

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.69314718055994531f;

struct TreeAttentionArgs {
  TreeAttentionParams p;
  uint32_t* fault;
};

// The nodes' masks as 32-bit words, with room for the node numbers of a whole key tile past the last node.
constexpr int kMaskWords = (kMaxNodes + 64) / 32;

// prefix_len[b] brought into [0, capacity - used]: positions beyond the block table do not exist.
SIMT_DEVICE int checked_prefix(const TreeAttentionArgs& a, int b, int used) {
  const int64_t capacity = (int64_t)a.p.table.pages_per_row * a.p.table.page_size;
  const int prefix = a.p.prefix_len[b];
  if (prefix >= 0 && prefix + (int64_t)used <= capacity) return prefix;
  *a.fault = kBadSeqLen;
  return prefix < 0 || used > capacity ? 0 : (int)(capacity - used);
}

SIMT_DEVICE const uint32_t* mask_of(const TreeAttentionParams& p, int b, int node) {
  return reinterpret_cast<const uint32_t*>(p.ancestor_bits + ((int64_t)b * p.tokens + node) * p.words);
}

// 1 + the highest node that `node` sees; 0 for padding.
SIMT_DEVICE int nodes_seen(const TreeAttentionParams& p, int b, int node) {
  const uint32_t* mask = mask_of(p, b, node);
  for (int w = 2 * p.words - 1; w >= 0; w--)
    if (mask[w]) return w * 32 + 32 - clz(mask[w]) < p.tokens ? w * 32 + 32 - clz(mask[w]) : p.tokens;
  return 0;
}

// Where one block's or warp's result goes: the output itself, or its share of the workspace.
SIMT_DEVICE float* partial_out(const TreeAttentionParams& p, int split, int64_t row) {
  const int64_t rows = (int64_t)p.batch * p.tokens * p.q_heads;
  return p.workspace + (split * rows + row) * p.dim;
}
SIMT_DEVICE float* partial_lse(const TreeAttentionParams& p, int split, int64_t row) {
  const int64_t rows = (int64_t)p.batch * p.tokens * p.q_heads;
  return p.workspace + p.splits * rows * p.dim + split * rows + row;
}

template <class T, int D>
struct TreeAttention {
  static constexpr int kThreads = 128, kMinArch = 800, kRows = 64, kKeys = 64, kChunks = D / 8;  // 16-byte chunks a row
  using Params = TreeAttentionArgs;
  struct Smem {
    alignas(128) T k[2][kKeys * D];
    alignas(128) T v[2][kKeys * D];  // v[1] holds the queries first, k[0] the outputs last
    uint32_t mask[kRows][kMaskWords];
  };
  // What a block works on.
  struct Tile {
    int b, kv_head, group, first_row, rows, prefix, end, split;
    int first_tile, tiles;  // of keys
  };

  // Position of 16-byte chunk c of row r; the XOR spreads a column of chunks over the banks.
  SIMT_DEVICE static int at(int r, int c) { return r * D + ((c ^ (r & 7)) << 3); }

  SIMT_DEVICE static int node_of(const Tile& t, int r) { return (t.first_row + r) / t.group; }
  SIMT_DEVICE static int head_of(const Tile& t, int r) { return t.kv_head * t.group + (t.first_row + r) % t.group; }
  SIMT_DEVICE static int64_t out_row(const TreeAttentionParams& p, const Tile& t, int r) {
    return ((int64_t)t.b * p.tokens + node_of(t, r)) * p.q_heads + head_of(t, r);
  }

  SIMT_DEVICE static Tile find_tile(const Params& a) {
    const TreeAttentionParams& p = a.p;
    Tile t;
    t.b = (int)block_idx().z / p.kv_heads;
    t.kv_head = (int)block_idx().z % p.kv_heads;
    t.group = p.q_heads / p.kv_heads;
    t.first_row = (int)block_idx().x * kRows;
    t.rows = p.tokens * t.group - t.first_row < kRows ? p.tokens * t.group - t.first_row : kRows;
    t.split = (int)block_idx().y;
    int used = 0;  // every warp finds it for itself
    for (int r = lane_id(); r < t.rows; r += kWarp) {
      const int seen = nodes_seen(p, t.b, node_of(t, r));
      used = seen > used ? seen : used;
    }
    used = redux_max(used);
    t.prefix = checked_prefix(a, t.b, used);
    t.end = used ? t.prefix + used : 0;  // padding only: no keys
    const int all = ceil_div(t.end, kKeys), share = ceil_div(all, p.splits);
    t.first_tile = t.split * share;
    t.tiles = all - t.first_tile < share ? all - t.first_tile : share;
    return t;
  }

  SIMT_DEVICE static void load_queries(const TreeAttentionParams& p, const Tile& t, T* to) {
    for (int i = thread_id(); i < kRows * kChunks; i += kThreads) {
      const int r = i / kChunks, c = i % kChunks;
      const bool real = r < t.rows;
      const T* from = static_cast<const T*>(p.q);
      if (real)
        from += t.b * p.q_strides.batch + node_of(t, r) * p.q_strides.token + head_of(t, r) * p.q_strides.head + c * 8;
      cp_async16(to + at(r, c), from, real);
    }
  }

  // Each warp gathers 16 keys: a lane looks one of them up, and hands its address to the lanes that copy it.
  SIMT_DEVICE static void load_keys(const Params& a, const Tile& t, int tile, T* k, T* v) {
    const TreeAttentionParams& p = a.p;
    const int lane = lane_id(), first = warp_id() * 16, key = tile * kKeys + first + (lane & 15);
    const int64_t slot = key < t.end ? slot_of(p.table, t.b, key, a.fault) : -1;
    const int64_t k_row = slot < 0 ? -1 : slot_offset(slot, p.table.page_size, p.k_strides);
    const int64_t v_row = slot < 0 ? -1 : slot_offset(slot, p.table.page_size, p.v_strides);
    const T* k_head = static_cast<const T*>(p.k_pages) + t.kv_head * p.k_strides.head;
    const T* v_head = static_cast<const T*>(p.v_pages) + t.kv_head * p.v_strides.head;
#pragma unroll
    for (int i = 0; i < 16 * kChunks / kWarp; i++) {
      const int r = (i * kWarp + lane) / kChunks, c = lane % kChunks;
      const int64_t k_from = shfl(k_row, r), v_from = shfl(v_row, r);
      const bool real = k_from >= 0;
      cp_async16(k + at(first + r, c), k_head + (real ? k_from + c * 8 : 0), real);
      cp_async16(v + at(first + r, c), v_head + (real ? v_from + c * 8 : 0), real);
    }
  }

  SIMT_DEVICE static void load_masks(const TreeAttentionParams& p, const Tile& t, Smem& s) {
    for (int i = thread_id(); i < kRows * kMaskWords; i += kThreads) {
      const int r = i / kMaskWords, w = i % kMaskWords;
      s.mask[r][w] = r < t.rows && w < 2 * p.words ? mask_of(p, t.b, node_of(t, r))[w] : 0;
    }
  }

  // S = Q K^T for this warp's 16 rows.
  SIMT_DEVICE static void scores(float (&x)[kKeys / 8][4], const uint32_t (&q)[D / 16][4], const T* k) {
    const int lane = lane_id();
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++)
#pragma unroll
      for (int n = 0; n < kKeys / 16; n++) {
        uint32_t b[4];
        ldmatrix_x4(b, k + at(n * 16 + (lane & 7) + ((lane >> 4) << 3), kk * 2 + ((lane >> 3) & 1)));
        mma_m16n8k16<T>(x[2 * n], q[kk], b[0], b[1]);
        mma_m16n8k16<T>(x[2 * n + 1], q[kk], b[2], b[3]);
      }
  }

  // Scales, hides what row r must not see, and turns scores into weights relative to the row's new maximum.
  struct Running {
    float top[2], sum[2];  // per row: largest score (base 2), this thread's share of the sum of weights
  };
  SIMT_DEVICE static void weights(float (&x)[kKeys / 8][4], float (&out)[D / 8][4], Running& run, const Tile& t,
                                  int tile, float scale, const Smem& s) {
    const int lane = lane_id(), first_node = tile * kKeys - t.prefix;
    const bool masked = first_node + kKeys > 0;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const uint32_t* mask = s.mask[warp_id() * 16 + lane / 4 + h * 8];
      float top = run.top[h];
#pragma unroll
      for (int n = 0; n < kKeys / 8; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& score = x[n][2 * h + e];
          const int node = first_node + n * 8 + lane % 4 * 2 + e;
          const bool hidden = masked && node >= 0 && !(mask[node >> 5] >> (node & 31) & 1);
          score = hidden ? -INFINITY : score * scale;
          top = fmaxf(top, score);
        }
      top = fmaxf(top, shfl_xor(top, 1));
      top = fmaxf(top, shfl_xor(top, 2));
      const float base = top == -INFINITY ? 0.f : top, shrink = exp2_approx(run.top[h] - base);
      run.top[h] = top;
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < kKeys / 8; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& score = x[n][2 * h + e];
          score = exp2_approx(score - base);
          sum += score;
        }
      run.sum[h] = run.sum[h] * shrink + sum;
#pragma unroll
      for (int d = 0; d < D / 8; d++) {
        out[d][2 * h] *= shrink;
        out[d][2 * h + 1] *= shrink;
      }
    }
  }

  // O += P V
  SIMT_DEVICE static void add_values(float (&out)[D / 8][4], const float (&x)[kKeys / 8][4], const T* v) {
    const int lane = lane_id();
#pragma unroll
    for (int kk = 0; kk < kKeys / 16; kk++) {
      const uint32_t a[4] = {pack2<T>(x[2 * kk][0], x[2 * kk][1]), pack2<T>(x[2 * kk][2], x[2 * kk][3]),
                             pack2<T>(x[2 * kk + 1][0], x[2 * kk + 1][1]),
                             pack2<T>(x[2 * kk + 1][2], x[2 * kk + 1][3])};
#pragma unroll
      for (int d = 0; d < D / 16; d++) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, v + at(kk * 16 + (lane & 15), d * 2 + (lane >> 4)));
        mma_m16n8k16<T>(out[2 * d], a, b[0], b[1]);
        mma_m16n8k16<T>(out[2 * d + 1], a, b[2], b[3]);
      }
    }
  }

  SIMT_DEVICE static void run(const Params& a, Smem& s) {
    const TreeAttentionParams& p = a.p;
    const Tile t = find_tile(a);
    float out[D / 8][4] = {};
    Running running = {{-INFINITY, -INFINITY}, {0.f, 0.f}};
    const bool active = warp_id() * 16 < t.rows;  // a warp without rows only helps to load
    load_masks(p, t, s);
    uint32_t q[D / 16][4];
    if (t.tiles > 0) {
      load_queries(p, t, s.v[1]);
      load_keys(a, t, t.first_tile, s.k[0], s.v[0]);
    }
    cp_async_commit();
    cp_async_wait<0>();
    sync_block();
    if (t.tiles > 0)
#pragma unroll
      for (int kk = 0; kk < D / 16; kk++)
        ldmatrix_x4(q[kk], s.v[1] + at(warp_id() * 16 + (lane_id() & 15), kk * 2 + (lane_id() >> 4)));
    for (int j = 0; j < t.tiles; j++) {
      sync_block();  // everyone has read the stage that is filled next
      if (j + 1 < t.tiles) load_keys(a, t, t.first_tile + j + 1, s.k[(j + 1) & 1], s.v[(j + 1) & 1]);
      cp_async_commit();
      cp_async_wait<1>();
      sync_block();
      if (!active) continue;
      float x[kKeys / 8][4] = {};
      scores(x, q, s.k[j & 1]);
      weights(x, out, running, t, t.first_tile + j, p.scale * kLog2e, s);
      add_values(out, x, s.v[j & 1]);
    }
    sync_block();
    if (active) write(p, t, out, running, s);
  }

  SIMT_DEVICE static bool padding(const Smem& s, int r) {
    uint32_t any = 0;
    for (int w = 0; w < kMaskWords; w++) any |= s.mask[r][w];
    return any == 0;
  }

  SIMT_DEVICE static void write(const TreeAttentionParams& p, const Tile& t, float (&out)[D / 8][4], Running& running,
                                Smem& s) {
    const int lane = lane_id(), first = warp_id() * 16;
    T* staged = s.k[0];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int r = first + lane / 4 + h * 8;
      float sum = running.sum[h];
      sum += shfl_xor(sum, 1);
      sum += shfl_xor(sum, 2);
      const bool none = padding(s, r) || sum == 0.f;
      const float inverse = none ? 0.f : 1.f / sum;
      const float lse = none ? -INFINITY : (running.top[h] + log2_approx(sum)) * kLn2;
      const bool real = r < t.rows;
      const int64_t row = real ? out_row(p, t, r) : 0;
      float* to = real && p.splits > 1 ? partial_out(p, t.split, row) : nullptr;
#pragma unroll
      for (int d = 0; d < D / 8; d++) {
        const float lo = none ? 0.f : out[d][2 * h] * inverse, hi = none ? 0.f : out[d][2 * h + 1] * inverse;
        if (to) *reinterpret_cast<float2*>(to + d * 8 + lane % 4 * 2) = float2{lo, hi};
        if (p.splits == 1) store4(staged + at(r, d) + lane % 4 * 2, pack2<T>(lo, hi));
      }
      if (real && lane % 4 == 0) *(p.splits > 1 ? partial_lse(p, t.split, row) : p.lse + row) = lse;
    }
    if (p.splits > 1) return;
    sync_warp();  // a warp stages and stores its own rows
#pragma unroll
    for (int i = 0; i < 16 * kChunks / kWarp; i++) {
      const int r = first + (i * kWarp + lane) / kChunks, c = lane % kChunks;
      if (r < t.rows) store16(static_cast<T*>(p.out) + out_row(p, t, r) * D + c * 8, load16(staged + at(r, c)));
    }
  }
};

}  // namespace tilewise::speculative
