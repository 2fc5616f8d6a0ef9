// Backward for fp16 and bf16 on tensor cores, without atomics: every gradient has one writer, so results repeat bit for
// bit. BackwardQueries keeps a tile of queries and passes over the keys for dq; BackwardKeys keeps a tile of keys and
// passes over the queries, and over the query heads that share them, for dk and dv. Both recompute the scores, which
// makes seven products of the five that one kernel with atomic dq would need (docs/performance/attention-cuda.md).
//
// BackwardKeys forms S and dP transposed, K Q^T and V dout^T. So in both kernels each warp owns the rows of what it
// accumulates, P and dS go from accumulator to A operand inside the registers, and only the streamed operands are
// shared between warps.
#pragma once
#include "attention/cuda/gradient.h"
#include "attention/cuda/tile.h"

namespace tilewise::attention {

// dq of one tile of queries.
template <class T, int D, class Mask>
struct BackwardQueries {
  static constexpr int kMinArch = 800, kThreads = 128, kMinBlocks = D == 64 ? 2 : 1;
  static constexpr int kWarpRows = Mask::kGeneral ? 16 : 32, kFragments = kWarpRows / 16;
  static constexpr int kQueries = kThreads / kWarp * kWarpRows;
  static constexpr int kKeys = D == 64 ? 64 : D == 128 ? 32 : 16, kStep = D == 256 ? 16 : 32;
  using Params = BackwardArgs;
  using Loader = TileLoader<D, kThreads, Mask::kGeneral, T>;
  struct Smem {
    alignas(128) T q[kQueries * D];
    alignas(128) T dout[kQueries * D];
    alignas(128) T k[2][kKeys * D];
    alignas(128) T v[2][kKeys * D];
  };
  using Rows = QueryRows<kFragments>;

  // Adds the keys [row, row + kStep) of a tile; `key` is the first one's index in the sequence.
  template <bool Masked>
  SIMT_DEVICE static void step(const Smem& s, int stage, int row, const Mask& mask, const Rows& rows, float scale_log2,
                               int query, int key, float (&dq)[kFragments][D / 8][4]) {
    const int own = warp_id() * kWarpRows;
    float scores[kFragments][kStep / 8][4] = {}, dp[kFragments][kStep / 8][4] = {};
    typename Mask::template Slopes<kStep / 8> slopes;
    multiply_transposed<D>(scores, s.q, own, s.k[stage], row);
    mask.template adjust_keys<T, Masked>(scores, query, key, &slopes);
    multiply_transposed<D>(dp, s.dout, own, s.v[stage], row);
    mask.drop_keys(dp, query, key);
    mask.scale_weights(dp);
#pragma unroll
    for (int i = 0; i < kFragments; i++)
#pragma unroll
      for (int j = 0; j < kStep / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float p = exp2_approx(scores[i][j][e] * scale_log2 - rows.base[i][e / 2]);
          dp[i][j][e] = p * (dp[i][j][e] - rows.delta[i][e / 2]);
        }
    mask.follow(dp, slopes);
    multiply<D>(dq, dp, s.k[stage], row);
  }

  SIMT_DEVICE static void run(const Params& args, Smem& s) {
    const BackwardParams& b = args.b;
    const ForwardParams& p = b.forward;
    const Work work = find_work<kQueries>(p, args.tiles, p.q_heads, Mask::kLongestTileLast, args.fault);
    const Sequence& seq = work.seq;
    const int head = work.head, kv_head = kv_head_of(p, head), first = work.first;
    if (first >= seq.q_len) return;

    const Mask mask(p, work);
    const int query = first + warp_id() * kWarpRows;
    const float scale_log2 = mask.softmax_scale(p.scale) * kLog2e;
    const int tiles = ceil_div(mask.key_end(first + kQueries), kKeys), full = mask.full_key_end(first) / kKeys;
    int tile = mask.template tile_above<kQueries, kKeys>(first, -1, tiles);
    float dq[kFragments][D / 8][4] = {};
    if (tile < tiles) {
      const int64_t row = seq.k_row + tile * kKeys;
      const Loader queries(row_pointer<T>(p.q, p.q_strides, seq.batch, head, seq.q_row + first), p.q_strides.row,
                           p.dim);
      const Loader douts(row_pointer<T>(b.dout, b.dout_strides, seq.batch, head, seq.q_row + first), b.dout_strides.row,
                         p.v_dim);
      Loader keys(row_pointer<T>(p.k, p.k_strides, seq.batch, kv_head, row), p.k_strides.row, p.dim);
      Loader values(row_pointer<T>(p.v, p.v_strides, seq.batch, kv_head, row), p.v_strides.row, p.v_dim);
      queries.template load<kQueries>(s.q, seq.q_len - first);
      douts.template load<kQueries>(s.dout, seq.q_len - first);
      keys.template load<kKeys>(s.k[0], seq.k_len - tile * kKeys);
      values.template load<kKeys>(s.v[0], seq.k_len - tile * kKeys);
      cp_async_commit();
      const Rows rows(b, stats_index(p, seq, head), query, seq.q_len);
      for (int next, stage = 0; tile < tiles; tile = next, stage ^= 1) {
        next = mask.template tile_above<kQueries, kKeys>(first, tile, tiles);
        cp_async_wait<0>();
        sync_block();  // this stage has arrived, and every warp has done with the other one
        if (next < tiles) {
          keys.skip((next - tile) * kKeys);
          values.skip((next - tile) * kKeys);
          keys.template load<kKeys>(s.k[stage ^ 1], seq.k_len - next * kKeys);
          values.template load<kKeys>(s.v[stage ^ 1], seq.k_len - next * kKeys);
        }
        cp_async_commit();
        if (!Mask::kGeneral && tile < full)
#pragma unroll 1
          for (int row = 0; row < kKeys; row += kStep)
            step<false>(s, stage, row, mask, rows, scale_log2, query, tile * kKeys + row, dq);
        else
#pragma unroll 1
          for (int row = 0; row < kKeys; row += kStep)
            step<true>(s, stage, row, mask, rows, scale_log2, query, tile * kKeys + row, dq);
      }
    }
#pragma unroll
    for (int i = 0; i < kFragments; i++) scale_accumulators(dq[i], p.scale);
    store_accumulators<D>(row_pointer<T>(b.dq, b.dq_strides, seq.batch, head, seq.q_row + query), b.dq_strides.row,
                          seq.q_len - query, Mask::kGeneral ? p.dim : D, dq, s.q, warp_id() * kWarpRows);
  }
};

// dk and dv of one tile of keys. Rows of the accumulators are keys, columns of the scores are queries.
template <class T, int D, class Mask, Part kPart = Part::dk_dv>
struct BackwardKeys {
  static constexpr bool kWide = !Mask::kGeneral && D == 128, kWantsDk = kPart != Part::dv, kWantsDv = kPart != Part::dk;
  static constexpr int kMinArch = 800, kThreads = kWide ? 256 : 128, kMinBlocks = D == 64 ? 2 : 1;
  static constexpr int kWarpRows = Mask::kGeneral || D > 64 ? 16 : 32, kFragments = kWarpRows / 16;
  static constexpr int kKeys = kThreads / kWarp * kWarpRows;
  static constexpr int kQueries = D == 64 ? 64 : D == 128 ? 32 : 16, kStep = Mask::kGeneral && D > 64 ? 16 : 32;
  using Params = BackwardArgs;
  using Loader = TileLoader<D, kThreads, Mask::kGeneral, T>;
  struct Smem {
    alignas(128) T k[kKeys * D];
    alignas(128) T v[kKeys * D];
    alignas(128) T q[2][kQueries * D];
    alignas(128) T dout[2][kQueries * D];
    alignas(16) float lse[2][kQueries];
    alignas(16) float delta[2][kQueries];
  };
  struct Gradients {
    float dk[kFragments][D / 8][4] = {}, dv[kFragments][D / 8][4] = {};
  };
  using Walk = QueryWalk<kQueries, kKeys, Mask>;

  // Starts the copy of a tile; queries past the end become zero, and so do their gradients.
  SIMT_DEVICE static void load_queries(Smem& s, int stage, const BackwardParams& b, const Sequence& seq,
                                       const Walk& at) {
    const ForwardParams& p = b.forward;
    const int head = at.head, first = at.first;
    const Loader queries(row_pointer<T>(p.q, p.q_strides, seq.batch, head, seq.q_row + first), p.q_strides.row, p.dim);
    const Loader douts(row_pointer<T>(b.dout, b.dout_strides, seq.batch, head, seq.q_row + first), b.dout_strides.row,
                       p.v_dim);
    queries.template load<kQueries>(s.q[stage], seq.q_len - first);
    douts.template load<kQueries>(s.dout[stage], seq.q_len - first);
    const int64_t stats = stats_index(p, seq, head) + first;
    const int row = thread_id() % kQueries;
    const bool exists = first + row < seq.q_len;
    const int64_t from = stats + (exists ? row : 0);
    if (thread_id() < kQueries)
      cp_async4(&s.lse[stage][row], p.lse + from, exists);
    else if (thread_id() < 2 * kQueries)
      cp_async4(&s.delta[stage][row], b.delta + from, exists);
  }

  // Adds the queries [column, column + kStep) of a tile; `query` is the first one's index in the sequence.
  template <bool Masked>
  SIMT_DEVICE static void step(const Smem& s, int stage, int column, const Mask& mask, float scale_log2, int key,
                               int query, Gradients& sums) {
    const int own = warp_id() * kWarpRows, t = lane_id() & 3;
    float p[kFragments][kStep / 8][4] = {}, ds[kFragments][kStep / 8][4] = {};
    typename Mask::template Slopes<kStep / 8> slopes;
    multiply_transposed<D>(p, s.k, own, s.q[stage], column);
    mask.template adjust_queries<T, Masked>(p, query, key, &slopes);
    if (kWantsDk) {
      multiply_transposed<D>(ds, s.v, own, s.dout[stage], column);
      mask.drop_queries(ds, query, key);
      mask.scale_weights(ds);
    }
#pragma unroll
    for (int j = 0; j < kStep / 8; j++) {
      const uint2 lse = load8(&s.lse[stage][column + 8 * j + 2 * t]);
      const uint2 delta = load8(&s.delta[stage][column + 8 * j + 2 * t]);
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const float base = exponent_base(bits_f32(c ? lse.y : lse.x)), d = bits_f32(c ? delta.y : delta.x);
#pragma unroll
        for (int i = 0; i < kFragments; i++)
#pragma unroll
          for (int e = c; e < 4; e += 2) {
            p[i][j][e] = exp2_approx(p[i][j][e] * scale_log2 - base);
            ds[i][j][e] = p[i][j][e] * (ds[i][j][e] - d);
          }
      }
    }
    if (kWantsDv) {
      mask.drop_queries(p, query, key);
      multiply<D>(sums.dv, p, s.dout[stage], column);
    }
    if (kWantsDk) {
      mask.follow(ds, slopes);
      multiply<D>(sums.dk, ds, s.q[stage], column);
    }
  }

  SIMT_DEVICE static void run(const Params& args, Smem& s) {
    const BackwardParams& b = args.b;
    const ForwardParams& p = b.forward;
    const Work work = find_work<kKeys>(p, args.tiles, p.kv_heads, false, args.fault);
    const Sequence& seq = work.seq;
    const int kv_head = work.head, first = work.first, heads = p.q_heads / p.kv_heads;
    if (first >= seq.k_len) return;

    Mask mask(p, work), later(p, work);  // of the tile at hand, and of the one that is being loaded
    const int full = mask.full_query_begin(first + kKeys);
    const int key = first + warp_id() * kWarpRows;
    const float scale_log2 = mask.softmax_scale(p.scale) * kLog2e;
    const int64_t row = seq.k_row + first;
    Gradients sums;
    Walk at(later, first, kv_head * heads, heads);
    if (!at.done()) {
      const Loader keys(row_pointer<T>(p.k, p.k_strides, seq.batch, kv_head, row), p.k_strides.row, p.dim);
      const Loader values(row_pointer<T>(p.v, p.v_strides, seq.batch, kv_head, row), p.v_strides.row, p.v_dim);
      keys.template load<kKeys>(s.k, seq.k_len - first);
      if (kWantsDk) values.template load<kKeys>(s.v, seq.k_len - first);
      load_queries(s, 0, b, seq, at);
      cp_async_commit();
      for (int stage = 0; !at.done(); stage ^= 1) {
        const int query = at.first;
        if constexpr (Mask::kGeneral) mask.head = at.head;
        at.advance(later, first);
        cp_async_wait<0>();
        sync_block();  // this stage has arrived, and every warp has done with the other one
        if (!at.done()) load_queries(s, stage ^ 1, b, seq, at);
        cp_async_commit();
        if (!Mask::kGeneral && query >= full)
#pragma unroll 1
          for (int column = 0; column < kQueries; column += kStep)
            step<false>(s, stage, column, mask, scale_log2, key, query + column, sums);
        else
#pragma unroll 1
          for (int column = 0; column < kQueries; column += kStep)
            step<true>(s, stage, column, mask, scale_log2, key, query + column, sums);
      }
    }
    store(b, work, key, sums, s);
  }

  SIMT_DEVICE static void store(const BackwardParams& b, const Work& work, int key, Gradients& sums, Smem& s) {
    const ForwardParams& p = b.forward;
    const Sequence& seq = work.seq;
    const int own = warp_id() * kWarpRows, valid = seq.k_len - key;
    if (kWantsDk) {
#pragma unroll
      for (int i = 0; i < kFragments; i++) scale_accumulators(sums.dk[i], p.scale);
      store_accumulators<D>(row_pointer<T>(b.dk, b.dk_strides, seq.batch, work.head, seq.k_row + key), b.dk_strides.row,
                            valid, Mask::kGeneral ? p.dim : D, sums.dk, s.k, own);
    }
    if (kWantsDv) {
      if constexpr (Mask::kGeneral) scale_accumulators(sums.dv[0], Mask(p, work).weight_scale());
      store_accumulators<D>(row_pointer<T>(b.dv, b.dv_strides, seq.batch, work.head, seq.k_row + key), b.dv_strides.row,
                            valid, Mask::kGeneral ? p.v_dim : D, sums.dv, s.v, own);
    }
  }
};

}  // namespace tilewise::attention
