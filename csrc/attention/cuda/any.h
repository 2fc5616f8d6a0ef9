// Attention on the fp32 units: for fp32, whose accuracy tensor cores do not keep, and for what the tensor-core kernels
// leave out: 16-bit tensors whose rows do not consist of aligned 16 bytes. Plain on purpose: one buffer per tile, loads
// not overlapped, the mask General for all. D is what the head dims are padded to.
#pragma once
#include "attention/cuda/delta.h"
#include "attention/cuda/float_tile.h"
#include "attention/cuda/general.h"

namespace tilewise::attention {

struct AnyArgs {
  BackwardParams b;  // the forward kernel uses b.forward only
  int tiles;         // of queries or keys, per sequence and head
  bool chunks;       // every row of every tensor consists of aligned 16 bytes
  uint32_t* fault;
};

// Differences of large numbers come before the factor log2(e): folded into the scale, as on tensor cores, it would
// round the large numbers themselves.
SIMT_DEVICE float exp_of(float x) {
  return exp2_approx(x * kLog2e);
}

// What a rectangle of scores needs besides q k^T: own rows are queries.
template <class T, int D>
struct AnyKeys {
  const General& mask;
  int query, key;  // of own row 0, of column 0
  uint32_t seen[kOwnRows], kept[kOwnRows];

  SIMT_DEVICE AnyKeys(const General& m, int first_query, int first_key)
      : mask(m), query(first_query + own_row()), key(first_key) {
    constexpr int kCount = kStreamRows<D> / 2;
    row_words<D>(seen, [&](int i, int column) { return mask.seen<kCount>(query + i, key + column); });
    if (mask.drops()) row_words<D>(kept, [&](int i, int column) { return mask.kept<kCount>(query + i, key + column); });
  }
  SIMT_DEVICE static bool bit(const uint32_t (&words)[kOwnRows], int i, int j) {
    return words[i] >> (own_column() + kLanesPerRow * j) & 1;
  }
  // -inf where hidden; `dot` is q . k
  SIMT_DEVICE float score(float dot, int i, int j, float* slope) const {
    *slope = 1.f;
    if (!bit(seen, i, j)) return -INFINITY;
    return mask.score<T>(dot * mask.p.scale, query + i, key + own_column() + kLanesPerRow * j, slope);
  }
  // Of a weight, or of its gradient, when others are dropped.
  SIMT_DEVICE float factor(int i, int j) const {
    return !mask.drops() ? 1.f : bit(kept, i, j) ? mask.weight_scale() : 0.f;
  }
};

// The same where own rows are keys.
template <class T, int D>
struct AnyQueries {
  const General& mask;
  int query, key;  // of column 0, of own row 0
  uint32_t seen, kept = 0;

  SIMT_DEVICE AnyQueries(const General& m, int first_query, int first_key)
      : mask(m), query(first_query), key(first_key + own_row()) {
    const int group = key / 8 * 8;
    seen = column_words<D>([&](int column) { return mask.seen<8>(query + column, group); });
    if (mask.drops()) kept = column_words<D>([&](int column) { return mask.kept<8>(query + column, group); });
  }
  SIMT_DEVICE float score(float dot, int i, int j, float* slope) const {
    *slope = 1.f;
    if (!(seen >> (8 * j + i) & 1)) return -INFINITY;
    return mask.score<T>(dot * mask.p.scale, query + own_column() + kLanesPerRow * j, key + i, slope);
  }
  SIMT_DEVICE float factor(int i, int j) const {
    return !mask.drops() ? 1.f : kept >> (8 * j + i) & 1 ? mask.weight_scale() : 0.f;
  }
};

template <class T, int D>
struct AnyForward {
  static constexpr int kMinArch = 800, kQueries = D == 256 ? 32 : 64, kKeys = kStreamRows<D>;
  static constexpr int kThreads = kQueries / kOwnRows * kLanesPerRow;
  using Params = AnyArgs;
  struct Smem {
    alignas(128) float q[kQueries * kPitch<D>];
    alignas(128) float k[kKeys * kPitch<D>];
    alignas(128) float v[kKeys * kPitch<D>];
    alignas(128) float weights[kQueries * kWeightPitch<D>];
  };
  struct State {
    float acc[kOwnRows][kOwnChunks<D>][4] = {};
    float max[kOwnRows], sum[kOwnRows];  // sum over this thread's columns
  };

  SIMT_DEVICE static void run(const Params& args, Smem& s) {
    const ForwardParams& p = args.b.forward;
    const Work work = find_work<kQueries>(p, args.tiles, p.q_heads, true, args.fault);
    const Sequence& seq = work.seq;
    const int head = work.head, kv_head = kv_head_of(p, head), first = work.first;
    if (first >= seq.q_len) return;

    const General mask(p, work);
    const int tiles = ceil_div(mask.key_end(first + kQueries), kKeys);
    load_float_tile<kQueries, D, kThreads>(s.q, row_pointer<T>(p.q, p.q_strides, seq.batch, head, seq.q_row + first),
                                           p.q_strides.row, seq.q_len - first, p.dim, args.chunks);
    State state;
    for (int i = 0; i < kOwnRows; i++) state.max[i] = -INFINITY, state.sum[i] = 0.f;
    for (int tile = -1; (tile = mask.tile_above<kQueries, kKeys>(first, tile, tiles)) < tiles;) {
      const int key = tile * kKeys;
      const int64_t row = seq.k_row + key;
      sync_block();  // every warp has done with the previous tile
      load_float_tile<kKeys, D, kThreads>(s.k, row_pointer<T>(p.k, p.k_strides, seq.batch, kv_head, row),
                                          p.k_strides.row, seq.k_len - key, p.dim, args.chunks);
      load_float_tile<kKeys, D, kThreads>(s.v, row_pointer<T>(p.v, p.v_strides, seq.batch, kv_head, row),
                                          p.v_strides.row, seq.k_len - key, p.v_dim, args.chunks);
      cp_async_commit();
      cp_async_wait<0>();
      sync_block();
      float scores[kOwnRows][kOwnColumns<D>];
      multiply_rows<D>(scores, s.q, s.k);
      update(state, scores, AnyKeys<T, D>(mask, first, key));
      share_weights<D>(s.weights, scores);
      add_weighted<D>(state.acc, s.weights, s.v);
    }
    cp_async_wait<0>();  // no key at all: the queries may still be on their way
    finish(state, mask.sink(), p.lse + stats_index(p, seq, head) + first, seq.q_len - first);
    store_float_rows<D>(row_pointer<T>(p.out, p.out_strides, seq.batch, head, seq.q_row + first), p.out_strides.row,
                        seq.q_len - first, p.v_dim, state.acc, state.sum);
  }

  // The online softmax of softmax.h.
  SIMT_DEVICE static void update(State& state, float (&scores)[kOwnRows][kOwnColumns<D>], const AnyKeys<T, D>& rules) {
#pragma unroll
    for (int i = 0; i < kOwnRows; i++) {
      float top = -INFINITY, slope;
#pragma unroll
      for (int j = 0; j < kOwnColumns<D>; j++) {
        scores[i][j] = rules.score(scores[i][j], i, j, &slope);
        top = fmaxf(top, scores[i][j]);
      }
      top = fmaxf(state.max[i], warp_max(top, kLanesPerRow));
      rescale(state, i, top);
      const float base = base_of(top);
#pragma unroll
      for (int j = 0; j < kOwnColumns<D>; j++) {
        scores[i][j] = exp_of(scores[i][j] - base);
        state.sum[i] += scores[i][j];
        scores[i][j] *= rules.factor(i, j);
      }
    }
  }

  SIMT_DEVICE static float base_of(float top) { return top == -INFINITY ? 0.f : top; }
  SIMT_DEVICE static void rescale(State& state, int i, float top) {
    const float correction = exp_of(state.max[i] - base_of(top));
    state.max[i] = top;
    state.sum[i] *= correction;
#pragma unroll
    for (int c = 0; c < kOwnChunks<D>; c++)
#pragma unroll
      for (int e = 0; e < 4; e++) state.acc[i][c][e] *= correction;
  }

  // Writes lse and leaves 1 / sum in `sum`, 0 for a row that saw nothing. The sink is one more key, without a value.
  SIMT_DEVICE static void finish(State& state, float sink, float* lse, int valid) {
#pragma unroll
    for (int i = 0; i < kOwnRows; i++) {
      rescale(state, i, fmaxf(state.max[i], sink));
      const float total = warp_sum(state.sum[i], kLanesPerRow) + exp_of(sink - base_of(state.max[i]));
      const int row = own_row() + i;
      if (own_column() == 0 && row < valid) lse[row] = total == 0.f ? -INFINITY : state.max[i] + logf(total);
      state.sum[i] = total == 0.f ? 0.f : 1.f / total;
    }
  }
};

// The backward kernels of backward.h on fp32 tiles: `Own` rows stay, the others stream past.
template <class T, int D>
struct AnyBackward {
  static constexpr int kRows = D == 64 ? 64 : D == 128 ? 32 : 16, kThreads = kRows / kOwnRows * kLanesPerRow;
  static constexpr int kStream = kStreamRows<D>;
  struct Smem {
    alignas(128) float own[2][kRows * kPitch<D>];         // q and dout, or k and v
    alignas(128) float streamed[2][kStream * kPitch<D>];  // k and v, or q and dout
    alignas(128) float weights[kRows * kWeightPitch<D>];
    float lse[kStream];
    float delta[kStream];
  };
  using Tile = float[kOwnRows][kOwnColumns<D>];

  // What scores subtract. A row that saw nothing has lse -inf and no gradient: +inf makes its weights zero.
  SIMT_DEVICE static float exponent_base(float lse) { return lse == -INFINITY ? INFINITY : lse; }

  template <int Rows>
  SIMT_DEVICE static void load_queries(float (&tiles)[2][Rows * kPitch<D>], const AnyArgs& args, const Sequence& seq,
                                       int head, int first) {
    const ForwardParams& p = args.b.forward;
    const int64_t row = seq.q_row + first;
    const int valid = seq.q_len - first;
    load_float_tile<Rows, D, kThreads>(tiles[0], row_pointer<T>(p.q, p.q_strides, seq.batch, head, row),
                                       p.q_strides.row, valid, p.dim, args.chunks);
    load_float_tile<Rows, D, kThreads>(tiles[1], row_pointer<T>(args.b.dout, args.b.dout_strides, seq.batch, head, row),
                                       args.b.dout_strides.row, valid, p.v_dim, args.chunks);
  }
  template <int Rows>
  SIMT_DEVICE static void load_keys(float (&tiles)[2][Rows * kPitch<D>], const AnyArgs& args, const Sequence& seq,
                                    int head, int first) {
    const ForwardParams& p = args.b.forward;
    const int64_t row = seq.k_row + first;
    const int valid = seq.k_len - first;
    load_float_tile<Rows, D, kThreads>(tiles[0], row_pointer<T>(p.k, p.k_strides, seq.batch, head, row),
                                       p.k_strides.row, valid, p.dim, args.chunks);
    load_float_tile<Rows, D, kThreads>(tiles[1], row_pointer<T>(p.v, p.v_strides, seq.batch, head, row),
                                       p.v_strides.row, valid, p.v_dim, args.chunks);
  }

  // A thread's rows of queries.
  struct Rows {
    float base[kOwnRows], delta[kOwnRows];

    SIMT_DEVICE Rows(const BackwardParams& b, int64_t stats, int query, int q_len) {
      for (int i = 0; i < kOwnRows; i++) {
        const bool exists = query + i < q_len;
        base[i] = exists ? exponent_base(b.forward.lse[stats + query + i]) : INFINITY;
        delta[i] = exists ? b.delta[stats + query + i] : 0.f;
      }
    }
  };
  // ds: the gradient of the scores of own queries and a streamed tile of keys, and with `Slope` of scale * q k^T.
  template <bool Slope>
  SIMT_DEVICE static void gradient(Tile& ds, const Smem& s, const Rows& rows, const AnyKeys<T, D>& rules) {
    Tile dp;
    multiply_rows<D>(ds, s.own[0], s.streamed[0]);
    multiply_rows<D>(dp, s.own[1], s.streamed[1]);
#pragma unroll
    for (int i = 0; i < kOwnRows; i++)
#pragma unroll
      for (int j = 0; j < kOwnColumns<D>; j++) {
        float slope;
        const float weight = exp_of(rules.score(ds[i][j], i, j, &slope) - rows.base[i]);
        ds[i][j] = weight * (dp[i][j] * rules.factor(i, j) - rows.delta[i]);
        if (Slope) ds[i][j] *= slope;
      }
  }
};

template <class T, int D>
struct AnyBackwardQueries : AnyBackward<T, D> {
  using Base = AnyBackward<T, D>;
  using typename Base::Smem;
  using Params = AnyArgs;
  static constexpr int kMinArch = 800, kQueries = Base::kRows, kThreads = Base::kThreads, kKeys = Base::kStream;

  SIMT_DEVICE static void run(const Params& args, Smem& s) {
    const BackwardParams& b = args.b;
    const ForwardParams& p = b.forward;
    const Work work = find_work<kQueries>(p, args.tiles, p.q_heads, true, args.fault);
    const Sequence& seq = work.seq;
    const int head = work.head, kv_head = kv_head_of(p, head), first = work.first;
    if (first >= seq.q_len) return;

    const General mask(p, work);
    const int tiles = ceil_div(mask.key_end(first + kQueries), kKeys);
    const typename Base::Rows rows(b, stats_index(p, seq, head), first + own_row(), seq.q_len);
    float scale[kOwnRows], dq[kOwnRows][kOwnChunks<D>][4] = {};
    for (int i = 0; i < kOwnRows; i++) scale[i] = p.scale;
    Base::template load_queries<kQueries>(s.own, args, seq, head, first);
    for (int tile = -1; (tile = mask.tile_above<kQueries, kKeys>(first, tile, tiles)) < tiles;) {
      sync_block();  // every warp has done with the previous tile
      Base::template load_keys<kKeys>(s.streamed, args, seq, kv_head, tile * kKeys);
      cp_async_commit();
      cp_async_wait<0>();
      sync_block();
      typename Base::Tile ds;
      Base::template gradient<true>(ds, s, rows, AnyKeys<T, D>(mask, first, tile * kKeys));
      share_weights<D>(s.weights, ds);
      add_weighted<D>(dq, s.weights, s.streamed[0]);
    }
    cp_async_wait<0>();
    store_float_rows<D>(row_pointer<T>(b.dq, b.dq_strides, seq.batch, head, seq.q_row + first), b.dq_strides.row,
                        seq.q_len - first, p.dim, dq, scale);
  }
};

template <class T, int D, Part kPart = Part::dk_dv>
struct AnyBackwardKeys : AnyBackward<T, D> {
  using Base = AnyBackward<T, D>;
  using typename Base::Smem;
  using Params = AnyArgs;
  static constexpr int kMinArch = 800, kKeys = Base::kRows, kThreads = Base::kThreads, kQueries = Base::kStream;
  static constexpr bool kWantsDk = kPart != Part::dv, kWantsDv = kPart != Part::dk;
  struct Gradients {
    float dk[kOwnRows][kOwnChunks<D>][4] = {}, dv[kOwnRows][kOwnChunks<D>][4] = {};
  };

  SIMT_DEVICE static void load_stats(Smem& s, const BackwardParams& b, int64_t first, int valid) {
    for (int i = thread_id(); i < kQueries; i += kThreads) {
      s.lse[i] = i < valid ? Base::exponent_base(b.forward.lse[first + i]) : INFINITY;
      s.delta[i] = i < valid ? b.delta[first + i] : 0.f;
    }
  }

  SIMT_DEVICE static void run(const Params& args, Smem& s) {
    const BackwardParams& b = args.b;
    const ForwardParams& p = b.forward;
    const Work work = find_work<kKeys>(p, args.tiles, p.kv_heads, false, args.fault);
    const Sequence& seq = work.seq;
    const int kv_head = work.head, first = work.first, heads = p.q_heads / p.kv_heads;
    if (first >= seq.k_len) return;

    General mask(p, work);
    const int begin = mask.query_begin(first) / kQueries * kQueries, end = mask.query_end(first, first + kKeys);
    Gradients sums;
    Base::template load_keys<kKeys>(s.own, args, seq, kv_head, first);
    for (mask.head = kv_head * heads; mask.head < (kv_head + 1) * heads; mask.head++)
      for (int query = begin; query < end; query += kQueries) {
        if (mask.blocked<kQueries, kKeys>(query, first)) continue;
        sync_block();  // every warp has done with the previous tile
        Base::template load_queries<kQueries>(s.streamed, args, seq, mask.head, query);
        load_stats(s, b, stats_index(p, seq, mask.head) + query, seq.q_len - query);
        cp_async_commit();
        cp_async_wait<0>();
        sync_block();
        add_tile(s, AnyQueries<T, D>(mask, query, first), sums);
      }
    cp_async_wait<0>();
    float scale[kOwnRows], one[kOwnRows];
    for (int i = 0; i < kOwnRows; i++) scale[i] = p.scale, one[i] = 1.f;
    const int64_t row = seq.k_row + first;
    const int valid = seq.k_len - first;
    if (kWantsDk)
      store_float_rows<D>(row_pointer<T>(b.dk, b.dk_strides, seq.batch, kv_head, row), b.dk_strides.row, valid, p.dim,
                          sums.dk, scale);
    if (kWantsDv)
      store_float_rows<D>(row_pointer<T>(b.dv, b.dv_strides, seq.batch, kv_head, row), b.dv_strides.row, valid, p.v_dim,
                          sums.dv, one);
  }

  SIMT_DEVICE static void add_tile(Smem& s, const AnyQueries<T, D>& rules, Gradients& sums) {
    typename Base::Tile weights, ds = {};
    multiply_rows<D>(weights, s.own[0], s.streamed[0]);
    if (kWantsDk) multiply_rows<D>(ds, s.own[1], s.streamed[1]);
#pragma unroll
    for (int j = 0; j < kOwnColumns<D>; j++) {
      const int column = own_column() + kLanesPerRow * j;
#pragma unroll
      for (int i = 0; i < kOwnRows; i++) {
        float slope;
        const float factor = rules.factor(i, j);
        const float weight = exp_of(rules.score(weights[i][j], i, j, &slope) - s.lse[column]);
        ds[i][j] = weight * (ds[i][j] * factor - s.delta[column]) * slope;
        weights[i][j] = weight * factor;
      }
    }
    if (kWantsDv) {
      share_weights<D>(s.weights, weights);
      add_weighted<D>(sums.dv, s.weights, s.streamed[1]);
    }
    if (kWantsDk) {
      share_weights<D>(s.weights, ds);
      add_weighted<D>(sums.dk, s.weights, s.streamed[0]);
    }
  }
};

}  // namespace tilewise::attention
