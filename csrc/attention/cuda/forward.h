// FlashAttention-2 (Dao 2023) forward for fp16 and bf16 on mma.sync, cp.async and ldmatrix: sm_80 and up.
//
// One block per tile of 128 queries, one warp per 32 of them: each ldmatrix of a key or value fragment then feeds four
// mma, which keeps shared memory at half of its bandwidth when the tensor cores run at their peak. (16 per warp with
// the mask General, whose rules need registers.) Keys and values take turns: the values of a tile arrive during Q K^T,
// the next keys during softmax and P V. D is what the head dims are padded to; only General has others than D.
#pragma once
#include "attention/cuda/general.h"
#include "attention/cuda/mask.h"
#include "attention/cuda/softmax.h"
#include "attention/cuda/tile.h"

namespace tilewise::attention {

struct ForwardArgs {
  ForwardParams p;
  int tiles;  // of queries, per sequence and head
  uint32_t* fault;
};

template <class T, int D, class Mask>
struct Forward {
  static constexpr int kMinArch = 800, kThreads = 128, kMinBlocks = 2;
  static constexpr int kWarpRows = Mask::kGeneral ? 16 : 32, kFragments = kWarpRows / 16;
  static constexpr int kQueries = kThreads / kWarp * kWarpRows, kKeys = D == 256 ? 32 : 64;
  using Params = ForwardArgs;
  struct Smem {
    alignas(128) T q[kQueries * D];
    alignas(128) T k[kKeys * D];
    alignas(128) T v[kKeys * D];
  };
  using Loader = TileLoader<D, kThreads, Mask::kGeneral, T>;
  struct State {
    float acc[kFragments][D / 8][4] = {};
    SoftmaxRows<kFragments> rows;
    SIMT_DEVICE explicit State(float scale) : rows(scale) {}
  };

  // `keys` stands on the tile above, `values` on this tile; only the very first tile may have missing rows.
  template <bool Masked>
  SIMT_DEVICE static void step(Smem& s, Loader& keys, Loader& values, const Mask& mask, int query, int tile, int next,
                               State& state) {
    cp_async_wait<0>();
    sync_block();  // the keys have arrived, and every warp has done with the previous values
    if (Masked)
      values.template load<kKeys>(s.v, mask.k_len - tile * kKeys);
    else
      values.template load<kKeys>(s.v);
    values.skip((next - tile) * kKeys);
    cp_async_commit();
    float scores[kFragments][kKeys / 8][4] = {};
    multiply_transposed<D>(scores, s.q, warp_id() * kWarpRows, s.k, 0);
    cp_async_wait<0>();
    sync_block();  // the values have arrived, and every warp has done with the keys
    keys.skip((next - tile + 1) * kKeys);
    if (next >= 0) keys.template load<kKeys>(s.k);
    keys.skip(-kKeys);
    cp_async_commit();
    if constexpr (Mask::kGeneral)
      mask.template adjust_keys<T, Masked>(scores, query, tile * kKeys);
    else if (Masked)
      hide_keys(scores, mask, query, tile * kKeys);  // not by way of adjust_keys: then sm_90 spills
    state.rows.update(scores, state.acc);
    mask.drop_keys(scores, query, tile * kKeys);
    multiply<D>(state.acc, scores, s.v, 0);
  }

  SIMT_DEVICE static void run(const Params& args, Smem& s) {
    const ForwardParams& p = args.p;
    const Work work = find_work<kQueries>(p, args.tiles, p.q_heads, Mask::kLongestTileLast, args.fault);
    const Sequence& seq = work.seq;
    const int head = work.head, kv_head = kv_head_of(p, head), first = work.first;
    if (first >= seq.q_len) return;

    const Mask mask(p, work);
    const int query = first + warp_id() * kWarpRows;
    State state(Mask::kGeneral ? 1.f : p.scale);
    int tile = ceil_div(mask.key_end(first + kQueries), kKeys) - 1;
    if constexpr (Mask::kGeneral) tile = mask.template tile_below<kQueries, kKeys>(first, tile + 1);
    if (tile >= 0) {
      const int64_t key = seq.k_row + tile * kKeys;
      Loader keys(row_pointer<T>(p.k, p.k_strides, seq.batch, kv_head, key), p.k_strides.row, p.dim);
      Loader values(row_pointer<T>(p.v, p.v_strides, seq.batch, kv_head, key), p.v_strides.row, p.v_dim);
      const Loader queries(row_pointer<T>(p.q, p.q_strides, seq.batch, head, seq.q_row + first), p.q_strides.row,
                           p.dim);
      queries.template load<kQueries>(s.q, seq.q_len - first);
      keys.template load<kKeys>(s.k, seq.k_len - tile * kKeys);
      keys.skip(-kKeys);
      cp_async_commit();
      // Downwards, so that the tiles that need masking come first.
      const int full = mask.full_key_end(first) / kKeys;
      if constexpr (Mask::kGeneral) {
        for (int next; tile >= 0; tile = next) {
          next = mask.template tile_below<kQueries, kKeys>(first, tile);
          step<true>(s, keys, values, mask, query, tile, next, state);
        }
      } else {
        for (; tile >= full; tile--) step<true>(s, keys, values, mask, query, tile, tile - 1, state);
        for (; tile >= 0; tile--) step<false>(s, keys, values, mask, query, tile, tile - 1, state);
      }
    }

    if constexpr (Mask::kGeneral) {
      state.rows.add_sink(mask.sink(), state.acc);
      state.rows.finish(state.acc, mask.weight_scale());
    } else {
      state.rows.finish(state.acc);
    }
    store_lse(p.lse + stats_index(p, seq, head), state.rows, query, seq.q_len);
    store_accumulators<D>(row_pointer<T>(p.out, p.out_strides, seq.batch, head, seq.q_row + query), p.out_strides.row,
                          seq.q_len - query, Mask::kGeneral ? p.v_dim : D, state.acc, s.q, warp_id() * kWarpRows);
  }

  SIMT_DEVICE static void store_lse(float* lse, const SoftmaxRows<kFragments>& rows, int query, int q_len) {
    const int g = lane_id() >> 2, t = lane_id() & 3;
#pragma unroll
    for (int i = 0; i < kFragments; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int row = query + 16 * i + 8 * h + g;
        if (t == 0 && row < q_len) lse[row] = rows.max[i][h];
      }
  }
};

}  // namespace tilewise::attention
