// dbias: the gradient of the scores, summed over whatever shares an element of the bias. Every element has one writer:
// a block owns a tile of dbias, visits all rectangles of scores that share it in a fixed order, recomputing S and dP,
// and sums in registers. The rectangles come from an engine, on tensor cores or on the fp32 units.
#pragma once
#include "attention/cuda/any.h"
#include "attention/cuda/backward.h"

namespace tilewise::attention {

struct BiasArgs {
  AnyArgs any;
  int64_t tiles[4];  // of dbias: batch, heads, tiles of rows, tiles of keys
};

// Rectangles of kRows x kKeys scores on the fp32 units.
template <class T, int D>
struct AnyEngine {
  using Base = AnyBackward<T, D>;
  using Smem = typename Base::Smem;
  static constexpr int kRows = Base::kRows, kKeys = Base::kStream, kThreads = Base::kThreads, kMinBlocks = 1;
  static constexpr int kPitch = kWeightPitch<D>;
  struct Sums {
    float at[kOwnRows][kOwnColumns<D>] = {};
  };

  SIMT_DEVICE static void add(Sums& sums, Smem& s, const AnyArgs& args, const Work& work, const General& mask,
                              int64_t stats, int key) {
    sync_block();  // every warp has done with the previous tiles
    Base::template load_queries<kRows>(s.own, args, work.seq, work.head, work.first);
    Base::template load_keys<kKeys>(s.streamed, args, work.seq, kv_head_of(args.b.forward, work.head), key);
    cp_async_commit();
    cp_async_wait<0>();
    sync_block();
    const typename Base::Rows rows(args.b, stats, work.first + own_row(), work.seq.q_len);
    typename Base::Tile ds;
    Base::template gradient<false>(ds, s, rows, AnyKeys<T, D>(mask, work.first, key));
#pragma unroll
    for (int i = 0; i < kOwnRows; i++)
#pragma unroll
      for (int j = 0; j < kOwnColumns<D>; j++) sums.at[i][j] += ds[i][j];
  }
  // Hands the sums to the block, row-major.
  SIMT_DEVICE static const float* share(const Sums& sums, Smem& s) {
    share_weights<D>(s.weights, sums.at);
    return s.weights;
  }
};

// The same on tensor cores: 64 x 32 scores, a warp for 16 rows.
template <class T, int D>
struct TensorEngine {
  static constexpr int kRows = 64, kKeys = D == 256 ? 16 : 32, kThreads = 128, kMinBlocks = D == 256 ? 1 : 2;
  static constexpr int kPitch = kKeys + 8;  // two values of the rows of a quarter warp in different banks
  static constexpr int N = kKeys / 8;
  using Loader = TileLoader<D, kThreads, true, T>;
  using Queries = BackwardQueries<T, D, General>;
  struct Smem {
    alignas(128) T q[kRows * D];
    alignas(128) T dout[kRows * D];
    alignas(128) T k[kKeys * D];
    alignas(128) T v[kKeys * D];
    alignas(128) float sums[kRows * kPitch];
  };
  struct Sums {
    float at[1][N][4] = {};
  };

  SIMT_DEVICE static void load(Smem& s, const AnyArgs& args, const Work& work, int key) {
    const BackwardParams& b = args.b;
    const ForwardParams& p = b.forward;
    const Sequence& seq = work.seq;
    const int head = work.head, kv_head = kv_head_of(p, head);
    const int64_t q_row = seq.q_row + work.first, k_row = seq.k_row + key;
    Loader(row_pointer<T>(p.q, p.q_strides, seq.batch, head, q_row), p.q_strides.row, p.dim)
        .template load<kRows>(s.q, seq.q_len - work.first);
    Loader(row_pointer<T>(b.dout, b.dout_strides, seq.batch, head, q_row), b.dout_strides.row, p.v_dim)
        .template load<kRows>(s.dout, seq.q_len - work.first);
    Loader(row_pointer<T>(p.k, p.k_strides, seq.batch, kv_head, k_row), p.k_strides.row, p.dim)
        .template load<kKeys>(s.k, seq.k_len - key);
    Loader(row_pointer<T>(p.v, p.v_strides, seq.batch, kv_head, k_row), p.v_strides.row, p.v_dim)
        .template load<kKeys>(s.v, seq.k_len - key);
  }

  SIMT_DEVICE static void add(Sums& sums, Smem& s, const AnyArgs& args, const Work& work, const General& mask,
                              int64_t stats, int key) {
    sync_block();  // the tiles before have been read
    load(s, args, work, key);
    cp_async_commit();
    const int own = warp_id() * 16;
    const typename Queries::Rows rows(args.b, stats, work.first + own, work.seq.q_len);
    cp_async_wait<0>();
    sync_block();
    float scores[1][N][4] = {}, dp[1][N][4] = {};
    multiply_transposed<D>(scores, s.q, own, s.k, 0);
    mask.adjust_keys<T, true>(scores, work.first + own, key);
    multiply_transposed<D>(dp, s.dout, own, s.v, 0);
    mask.drop_keys(dp, work.first + own, key);
    mask.scale_weights(dp);
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        sums.at[0][j][e] +=
            exp2_approx(scores[0][j][e] * kLog2e - rows.base[0][e / 2]) * (dp[0][j][e] - rows.delta[0][e / 2]);
  }
  SIMT_DEVICE static const float* share(const Sums& sums, Smem& s) {
    const int row = warp_id() * 16 + (lane_id() >> 2), column = 2 * (lane_id() & 3);
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) s.sums[(row + 8 * (e / 2)) * kPitch + column + 8 * j + e % 2] = sums.at[0][j][e];
    return s.sums;
  }
};

template <class T, class Engine>
struct BiasGradient {
  static constexpr int kMinArch = 800, kThreads = Engine::kThreads, kMinBlocks = Engine::kMinBlocks;
  static constexpr int kRows = Engine::kRows, kKeys = Engine::kKeys;
  using Params = BiasArgs;
  using Smem = typename Engine::Smem;
  struct Range {
    int begin, end;

    // One of dbias's tiles, or all `count` where they share it.
    SIMT_DEVICE Range(int64_t size, int64_t at, int count)
        : begin(size == 1 ? 0 : static_cast<int>(at)), end(size == 1 ? count : static_cast<int>(at) + 1) {}
  };

  SIMT_DEVICE static void run(const Params& args, Smem& s) {
    const BackwardParams& b = args.any.b;
    const ForwardParams& p = b.forward;
    const int64_t index = block_idx().x, *tiles = args.tiles;
    const int64_t key_tile = index % tiles[3], row_tile = index / tiles[3] % tiles[2];
    const int64_t head = index / tiles[3] / tiles[2] % tiles[1], batch = index / tiles[3] / tiles[2] / tiles[1];

    typename Engine::Sums sums;
    const Range batches(b.dbias_sizes[0], batch, p.batch), heads(b.dbias_sizes[1], head, p.q_heads);
    for (int sequence = batches.begin; sequence < batches.end; sequence++) {
      const Sequence seq = find_sequence(p, sequence, args.any.fault);
      for (int h = heads.begin; h < heads.end; h++) add_head(sums, s, args, {seq, sequence, h, 0}, row_tile, key_tile);
    }
    const float* shared = Engine::share(sums, s);
    sync_block();
    const int64_t first_row = b.dbias_sizes[2] == 1 ? 0 : row_tile * kRows;
    const int64_t first_key = b.dbias_sizes[3] == 1 ? 0 : key_tile * kKeys;
    store(b, (batch * tiles[1] + head) * b.dbias_sizes[2], first_row, first_key, shared);
  }

  SIMT_DEVICE static void add_head(typename Engine::Sums& sums, Smem& s, const Params& args, Work work,
                                   int64_t row_tile, int64_t key_tile) {
    const BackwardParams& b = args.any.b;
    const Sequence& seq = work.seq;
    const General mask(b.forward, work);
    const int64_t stats = stats_index(b.forward, seq, work.head);
    const Range rows(b.dbias_sizes[2], row_tile, ceil_div(seq.q_len, kRows));
    const Range keys(b.dbias_sizes[3], key_tile, ceil_div(seq.k_len, kKeys));
    for (int row = rows.begin; row < rows.end; row++) {
      work.first = row * kRows;
      if (work.first >= seq.q_len) break;
      const int end = min_of(keys.end, ceil_div(mask.key_end(work.first + kRows), kKeys));
      for (int tile = keys.begin - 1; (tile = mask.tile_above<kRows, kKeys>(work.first, tile, end)) < end;)
        Engine::add(sums, s, args.any, work, mask, stats, tile * kKeys);
    }
  }

  // Rows and keys of the tile that share an element are summed one after the other.
  SIMT_DEVICE static void store(const BackwardParams& b, int64_t row_offset, int64_t first_row, int64_t first_key,
                                const float* sums) {
    const int64_t *sizes = b.dbias_sizes, row_size = sizes[2], key_size = sizes[3];
    const int rows_each = row_size == 1 ? kRows : 1, keys_each = key_size == 1 ? kKeys : 1;
    const int rows = kRows / rows_each, keys = kKeys / keys_each;
    for (int i = thread_id(); i < rows * keys; i += kThreads) {
      const int row = i / keys, key = i % keys;
      if (first_row + row >= row_size || first_key + key >= key_size) continue;
      float sum = 0.f;
      for (int r = 0; r < rows_each; r++)
        for (int k = 0; k < keys_each; k++) sum += sums[(row + r) * Engine::kPitch + key + k];
      const int64_t at = (row_offset + first_row + row) * key_size + first_key + key;
      if (b.forward.rules.bias_type == Type::f32)
        static_cast<float*>(b.dbias)[at] = sum;
      else
        static_cast<T*>(b.dbias)[at] = from_float<T>(sum);
    }
  }
};

}  // namespace tilewise::attention
