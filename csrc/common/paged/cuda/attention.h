// Attention over a paged cache on the tensor cores (sm_80 mma.sync), in the manner of flash decoding: the tokens and
// heads that share a key head are the rows of one tile, so K and V are read once for all of them; blocks share out the
// keys, and MergeSplits (rows.h) joins their results. Key tiles are gathered through the block table with cp.async,
// double-buffered.
//
// What a token sees is a policy:
//   Params, kWords                      kernel parameters; 32-bit words of shared memory for a row
//   Visibility(params, b, first, last, fault)   of tokens first to last; a warp makes it together
//   first, end                          nobody sees a key outside
//   full(key, count)                    all see all of these
//   load_word(params, b, token, w)      of a row's shared memory
//   row(token, words) -> Row            row.sees(key), row.blind(): it sees nothing, also no key that is seen by all
#pragma once
#include "common/paged/cuda/pages.h"

namespace tilewise::paged {

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.69314718055994531f;

template <class Params>
struct Args {
  Params p;
  uint32_t* fault;
};

// Where one block's or warp's result goes: the output itself, or its share of the workspace.
SIMT_DEVICE int64_t workspace_row(const AttentionParams& p, int b, int token, int head) {
  return ((int64_t)b * p.tokens + token) * p.q_heads + head;
}
SIMT_DEVICE float* partial_out(const AttentionParams& p, int split, int64_t row) {
  const int64_t rows = (int64_t)p.batch * p.tokens * p.q_heads;
  return p.workspace + (split * rows + row) * p.dim;
}
SIMT_DEVICE float* partial_lse(const AttentionParams& p, int split, int64_t row) {
  const int64_t rows = (int64_t)p.batch * p.tokens * p.q_heads;
  return p.workspace + p.splits * rows * p.dim + split * rows + row;
}
SIMT_DEVICE int64_t offset(const TokenStrides& s, int b, int token, int head) {
  return b * s.batch + token * s.token + head * s.head;
}

// limit * tanh(x / limit) for scores in powers of two: by exp2, and by a polynomial where that cancels.
SIMT_DEVICE float softcap(float x, float limit) {
  const float y = x / limit, y2 = y * y;
  const float bounded = fminf(fmaxf(y, -20.f), 20.f);
  const float far = 1.f - 2.f / (1.f + exp2_approx(bounded * (2.f * kLog2e)));
  float near = -5.70498872745e-3f;
  near = near * y2 + 2.06390887954e-2f;
  near = near * y2 - 5.37397155531e-2f;
  near = near * y2 + 1.33314422036e-1f;
  near = near * y2 - 3.33332819422e-1f;
  near = y + y * y2 * near;
  return y == y ? limit * (fabsf(y) < 0.625f ? near : far) : y;
}

template <class T, int D, class Visibility>
struct PagedAttention {
  static constexpr int kThreads = 128, kMinArch = 800, kRows = 64, kKeys = 64, kChunks = D / 8;  // 16-byte chunks a row
  using Params = Args<typename Visibility::Params>;
  struct Smem {
    alignas(128) T k[2][kKeys * D];
    alignas(128) T v[2][kKeys * D];  // v[1] holds the queries first, k[0] the outputs last
    uint32_t words[kRows][Visibility::kWords ? Visibility::kWords : 1];
  };
  // What a block works on.
  struct Tile {
    int b, kv_head, group, first_row, rows, split;
    int first_tile, tiles;  // of keys
  };

  // Position of 16-byte chunk c of row r; the XOR spreads a column of chunks over the banks.
  SIMT_DEVICE static int at(int r, int c) { return r * D + ((c ^ (r & 7)) << 3); }

  SIMT_DEVICE static int token_of(const Tile& t, int r) { return (t.first_row + r) / t.group; }
  SIMT_DEVICE static int head_of(const Tile& t, int r) { return t.kv_head * t.group + (t.first_row + r) % t.group; }
  SIMT_DEVICE static int64_t offset_of(const TokenStrides& s, const Tile& t, int r) {
    return offset(s, t.b, token_of(t, r), head_of(t, r));
  }

  SIMT_DEVICE static Tile find_tile(const Params& a) {
    const AttentionParams& p = a.p;
    Tile t;
    t.b = (int)block_idx().z / p.kv_heads;
    t.kv_head = (int)block_idx().z % p.kv_heads;
    t.group = p.q_heads / p.kv_heads;
    t.first_row = (int)block_idx().x * kRows;
    t.rows = p.tokens * t.group - t.first_row < kRows ? p.tokens * t.group - t.first_row : kRows;
    t.split = (int)block_idx().y;
    return t;
  }

  // Shares out the tiles of keys, which start at multiples of kKeys.
  SIMT_DEVICE static void find_keys(const AttentionParams& p, const Visibility& visible, Tile& t) {
    const int begin = visible.first / kKeys,
              all = visible.end > visible.first ? ceil_div(visible.end, kKeys) - begin : 0;
    const int share = ceil_div(all, p.splits), from = t.split * share;
    t.first_tile = begin + from;
    t.tiles = all - from < share ? all - from : share;
  }

  SIMT_DEVICE static void load_queries(const AttentionParams& p, const Tile& t, T* to) {
    for (int i = thread_id(); i < kRows * kChunks; i += kThreads) {
      const int r = i / kChunks, c = i % kChunks;
      const bool real = r < t.rows;
      const T* from = static_cast<const T*>(p.q);
      if (real) from += offset_of(p.q_strides, t, r) + c * 8;
      cp_async16(to + at(r, c), from, real);
    }
  }

  // Each warp gathers 16 keys: a lane looks one of them up, and hands its address to the lanes that copy it.
  SIMT_DEVICE static void load_keys(const Params& a, const Tile& t, const Visibility& visible, int tile, T* k, T* v) {
    const AttentionParams& p = a.p;
    const int lane = lane_id(), first = warp_id() * 16, key = tile * kKeys + first + (lane & 15);
    const bool wanted = key >= visible.first && key < visible.end;
    const int64_t slot = wanted ? slot_of(p.table, t.b, key, a.fault) : -1;
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

  SIMT_DEVICE static void load_words(const Params& a, const Tile& t, Smem& s) {
    constexpr int kWords = Visibility::kWords;
    if constexpr (kWords > 0)
      for (int i = thread_id(); i < kRows * kWords; i += kThreads) {
        const int r = i / kWords, w = i % kWords;
        s.words[r][w] = r < t.rows ? Visibility::load_word(a.p, t.b, token_of(t, r), w) : 0;
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
                                  const Visibility& visible, int tile, const AttentionParams& p, const Smem& s) {
    const int lane = lane_id(), first_key = tile * kKeys;
    const float scale = p.scale * kLog2e, limit = p.softcap * kLog2e;
    const bool masked = !visible.full(first_key, kKeys);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int r = warp_id() * 16 + lane / 4 + h * 8;
      const auto row = visible.row(token_of(t, r), s.words[r]);
      float top = run.top[h];
#pragma unroll
      for (int n = 0; n < kKeys / 8; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& score = x[n][2 * h + e];
          score *= scale;
          if (limit != 0.f) score = softcap(score, limit);
          if (masked && !row.sees(first_key + n * 8 + lane % 4 * 2 + e)) score = -INFINITY;
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
    const AttentionParams& p = a.p;
    Tile t = find_tile(a);
    const Visibility visible(a.p, t.b, token_of(t, 0), token_of(t, t.rows - 1), a.fault);
    find_keys(p, visible, t);
    float out[D / 8][4] = {};
    Running running = {{-INFINITY, -INFINITY}, {0.f, 0.f}};
    const bool active = warp_id() * 16 < t.rows;  // a warp without rows only helps to load
    load_words(a, t, s);
    uint32_t q[D / 16][4];
    if (t.tiles > 0) {
      load_queries(p, t, s.v[1]);
      load_keys(a, t, visible, t.first_tile, s.k[0], s.v[0]);
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
      if (j + 1 < t.tiles) load_keys(a, t, visible, t.first_tile + j + 1, s.k[(j + 1) & 1], s.v[(j + 1) & 1]);
      cp_async_commit();
      cp_async_wait<1>();
      sync_block();
      if (!active) continue;
      float x[kKeys / 8][4] = {};
      scores(x, q, s.k[j & 1]);
      weights(x, out, running, t, visible, t.first_tile + j, p, s);
      add_values(out, x, s.v[j & 1]);
    }
    sync_block();
    if (active) write(p, t, visible, out, running, s);
  }

  SIMT_DEVICE static void write(const AttentionParams& p, const Tile& t, const Visibility& visible,
                                float (&out)[D / 8][4], Running& running, Smem& s) {
    const int lane = lane_id(), first = warp_id() * 16;
    T* staged = s.k[0];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int r = first + lane / 4 + h * 8;
      float sum = running.sum[h];
      sum += shfl_xor(sum, 1);
      sum += shfl_xor(sum, 2);
      const bool none = visible.row(token_of(t, r), s.words[r]).blind() || sum == 0.f;
      const float inverse = none ? 0.f : 1.f / sum;
      const float lse = none ? -INFINITY : (running.top[h] + log2_approx(sum)) * kLn2;
      const bool real = r < t.rows;
      const int64_t row = real ? workspace_row(p, t.b, token_of(t, r), head_of(t, r)) : 0;
      float* to = real && p.splits > 1 ? partial_out(p, t.split, row) : nullptr;
#pragma unroll
      for (int d = 0; d < D / 8; d++) {
        const float lo = none ? 0.f : out[d][2 * h] * inverse, hi = none ? 0.f : out[d][2 * h + 1] * inverse;
        if (to) *reinterpret_cast<float2*>(to + d * 8 + lane % 4 * 2) = float2{lo, hi};
        if (p.splits == 1) store4(staged + at(r, d) + lane % 4 * 2, pack2<T>(lo, hi));
      }
      if (real && lane % 4 == 0)
        *(p.splits > 1 ? partial_lse(p, t.split, row) : p.lse + offset_of(p.lse_strides, t, r)) = lse;
    }
    if (p.splits > 1) return;
    sync_warp();  // a warp stages and stores its own rows
#pragma unroll
    for (int i = 0; i < 16 * kChunks / kWarp; i++) {
      const int r = first + (i * kWarp + lane) / kChunks, c = lane % kChunks;
      if (r < t.rows)
        store16(static_cast<T*>(p.out) + offset_of(p.out_strides, t, r) + c * 8, load16(staged + at(r, c)));
    }
  }
};

}  // namespace tilewise::paged
