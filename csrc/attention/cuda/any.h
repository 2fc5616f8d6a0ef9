// Attention on the fp32 units: for fp32, whose accuracy tensor cores do not keep, and for what the tensor-core kernels
// leave out: 16-bit tensors whose rows do not start on 16 bytes, and scales that are not positive. Plain on purpose:
// one buffer per tile, loads not overlapped.
#pragma once
#include "attention/cuda/delta.h"
#include "attention/cuda/float_tile.h"
#include "attention/cuda/mask.h"

namespace tilewise::attention {

struct AnyArgs {
  BackwardParams b;  // the forward kernel uses b.forward only
  int tiles;         // of queries or keys, per sequence and head
  bool chunks;       // every row of every tensor starts on 16 bytes
  uint32_t* fault;
};

// Differences of large numbers come before the factor log2(e): folded into the scale, as on tensor cores, it would
// round the large numbers themselves.
SIMT_DEVICE float exp_of(float x) {
  return exp2_approx(x * kLog2e);
}

template <class T, int D>
struct AnyForward {
  static constexpr int kMinArch = 800, kQueries = 64, kThreads = kQueries / kOwnRows * kLanesPerRow;
  using Params = AnyArgs;
  struct Smem {
    alignas(128) float q[kQueries * kPitch<D>];
    alignas(128) float k[kStreamRows * kPitch<D>];
    alignas(128) float v[kStreamRows * kPitch<D>];
    alignas(128) float weights[kQueries * kWeightPitch];
  };
  struct State {
    float acc[kOwnRows][kOwnChunks<D>][4] = {};
    float max[kOwnRows], sum[kOwnRows];  // sum over this thread's columns
  };

  SIMT_DEVICE static void run(const Params& args, Smem& s) {
    const ForwardParams& p = args.b.forward;
    const Place place = find_place(args.tiles, p.q_heads);
    const Sequence seq = find_sequence(p, place.batch, args.fault);
    const int head = place.head, kv_head = head / (p.q_heads / p.kv_heads), first = place.tile * kQueries;
    if (first >= seq.q_len) return;

    const DenseOrCausal mask(p.causal, seq.q_len, seq.k_len);
    const int end = mask.key_end(first + kQueries);
    load_float_tile<kQueries, D, kThreads>(s.q, row_pointer<T>(p.q, p.q_strides, seq.batch, head, seq.q_row + first),
                                           p.q_strides.row, seq.q_len - first, args.chunks);
    State state;
    for (int i = 0; i < kOwnRows; i++) state.max[i] = -INFINITY, state.sum[i] = 0.f;
    for (int key = 0; key < end; key += kStreamRows) {
      const int64_t row = seq.k_row + key;
      sync_block();  // every warp has done with the previous tile
      load_float_tile<kStreamRows, D, kThreads>(s.k, row_pointer<T>(p.k, p.k_strides, seq.batch, kv_head, row),
                                                p.k_strides.row, seq.k_len - key, args.chunks);
      load_float_tile<kStreamRows, D, kThreads>(s.v, row_pointer<T>(p.v, p.v_strides, seq.batch, kv_head, row),
                                                p.v_strides.row, seq.k_len - key, args.chunks);
      cp_async_commit();
      cp_async_wait<0>();
      sync_block();
      float scores[kOwnRows][kOwnColumns];
      multiply_rows<D>(scores, s.q, s.k);
      update(state, scores, mask, first + own_row(), key, p.scale);
      share_weights(s.weights, scores);
      add_weighted<D>(state.acc, s.weights, s.v);
    }
    cp_async_wait<0>();  // no key at all: the queries may still be on their way
    finish(state, p.lse + stats_index(p, seq, head) + first, seq.q_len - first);
    store_float_rows<D>(row_pointer<T>(p.out, p.out_strides, seq.batch, head, seq.q_row + first), p.out_strides.row,
                        seq.q_len - first, state.acc, state.sum);
  }

  // The online softmax of softmax.h; here the scale comes before the mask, so that it may have any sign.
  SIMT_DEVICE static void update(State& state, float (&scores)[kOwnRows][kOwnColumns], const DenseOrCausal& mask,
                                 int query, int key, float scale) {
#pragma unroll
    for (int i = 0; i < kOwnRows; i++) {
      const int limit = mask.key_limit(query + i);
      float top = -INFINITY;
#pragma unroll
      for (int j = 0; j < kOwnColumns; j++) {
        const bool seen = key + own_column() + kLanesPerRow * j < limit;
        scores[i][j] = seen ? scores[i][j] * scale : -INFINITY;
        top = fmaxf(top, scores[i][j]);
      }
      top = fmaxf(state.max[i], warp_max(top, kLanesPerRow));
      const float base = top == -INFINITY ? 0.f : top, correction = exp_of(state.max[i] - base);
      state.max[i] = top;
      state.sum[i] *= correction;
#pragma unroll
      for (int j = 0; j < kOwnColumns; j++) {
        scores[i][j] = exp_of(scores[i][j] - base);
        state.sum[i] += scores[i][j];
      }
#pragma unroll
      for (int c = 0; c < kOwnChunks<D>; c++)
#pragma unroll
        for (int e = 0; e < 4; e++) state.acc[i][c][e] *= correction;
    }
  }

  // Writes lse and leaves 1 / sum in `sum`, 0 for a row that saw nothing.
  SIMT_DEVICE static void finish(State& state, float* lse, int valid) {
#pragma unroll
    for (int i = 0; i < kOwnRows; i++) {
      const float total = warp_sum(state.sum[i], kLanesPerRow);
      const int row = own_row() + i;
      if (own_column() == 0 && row < valid) lse[row] = total == 0.f ? -INFINITY : state.max[i] + logf(total);
      state.sum[i] = total == 0.f ? 0.f : 1.f / total;
    }
  }
};

// The backward kernels of backward.h on fp32 tiles: `Own` rows stay, the others stream past.
template <class T, int D>
struct AnyBackward {
  static constexpr int kRows = D == 64 ? 64 : 32, kThreads = kRows / kOwnRows * kLanesPerRow;
  struct Smem {
    alignas(128) float own[2][kRows * kPitch<D>];             // q and dout, or k and v
    alignas(128) float streamed[2][kStreamRows * kPitch<D>];  // k and v, or q and dout
    alignas(128) float weights[kRows * kWeightPitch];
    float lse[kStreamRows];
    float delta[kStreamRows];
  };

  // What scores subtract. A row that saw nothing has lse -inf and no gradient: +inf makes its weights zero.
  SIMT_DEVICE static float exponent_base(float lse) { return lse == -INFINITY ? INFINITY : lse; }

  template <int Rows>
  SIMT_DEVICE static void load_pair(float (&tiles)[2][Rows * kPitch<D>], const T* a, int64_t a_stride, const T* b,
                                    int64_t b_stride, int valid, bool chunks) {
    load_float_tile<Rows, D, kThreads>(tiles[0], a, a_stride, valid, chunks);
    load_float_tile<Rows, D, kThreads>(tiles[1], b, b_stride, valid, chunks);
  }
  template <int Rows>
  SIMT_DEVICE static void load_queries(float (&tiles)[2][Rows * kPitch<D>], const AnyArgs& args, const Sequence& seq,
                                       int head, int first) {
    const ForwardParams& p = args.b.forward;
    const int64_t row = seq.q_row + first;
    load_pair<Rows>(tiles, row_pointer<T>(p.q, p.q_strides, seq.batch, head, row), p.q_strides.row,
                    row_pointer<T>(args.b.dout, args.b.dout_strides, seq.batch, head, row), args.b.dout_strides.row,
                    seq.q_len - first, args.chunks);
  }
  template <int Rows>
  SIMT_DEVICE static void load_keys(float (&tiles)[2][Rows * kPitch<D>], const AnyArgs& args, const Sequence& seq,
                                    int head, int first) {
    const ForwardParams& p = args.b.forward;
    const int64_t row = seq.k_row + first;
    load_pair<Rows>(tiles, row_pointer<T>(p.k, p.k_strides, seq.batch, head, row), p.k_strides.row,
                    row_pointer<T>(p.v, p.v_strides, seq.batch, head, row), p.v_strides.row, seq.k_len - first,
                    args.chunks);
  }
};

template <class T, int D>
struct AnyBackwardQueries : AnyBackward<T, D> {
  using Base = AnyBackward<T, D>;
  using typename Base::Smem;
  using Params = AnyArgs;
  static constexpr int kMinArch = 800, kQueries = Base::kRows, kThreads = Base::kThreads;

  SIMT_DEVICE static void run(const Params& args, Smem& s) {
    const BackwardParams& b = args.b;
    const ForwardParams& p = b.forward;
    const Place place = find_place(args.tiles, p.q_heads);
    const Sequence seq = find_sequence(p, place.batch, args.fault);
    const int head = place.head, kv_head = head / (p.q_heads / p.kv_heads), first = place.tile * kQueries;
    if (first >= seq.q_len) return;

    const DenseOrCausal mask(p.causal, seq.q_len, seq.k_len);
    const int end = mask.key_end(first + kQueries), query = first + own_row();
    const int64_t stats = stats_index(p, seq, head);
    float base[kOwnRows], delta[kOwnRows], scale[kOwnRows], dq[kOwnRows][kOwnChunks<D>][4] = {};
    for (int i = 0; i < kOwnRows; i++) {
      const bool exists = query + i < seq.q_len;
      base[i] = exists ? Base::exponent_base(p.lse[stats + query + i]) : INFINITY;
      delta[i] = exists ? b.delta[stats + query + i] : 0.f;
      scale[i] = p.scale;
    }
    Base::template load_queries<kQueries>(s.own, args, seq, head, first);
    for (int key = 0; key < end; key += kStreamRows) {
      sync_block();  // every warp has done with the previous tile
      Base::template load_keys<kStreamRows>(s.streamed, args, seq, kv_head, key);
      cp_async_commit();
      cp_async_wait<0>();
      sync_block();
      float ds[kOwnRows][kOwnColumns], dp[kOwnRows][kOwnColumns];
      multiply_rows<D>(ds, s.own[0], s.streamed[0]);
      multiply_rows<D>(dp, s.own[1], s.streamed[1]);
#pragma unroll
      for (int i = 0; i < kOwnRows; i++) {
        const int limit = mask.key_limit(query + i);
#pragma unroll
        for (int j = 0; j < kOwnColumns; j++) {
          const bool seen = key + own_column() + kLanesPerRow * j < limit;
          const float weight = seen ? exp_of(fmaf(ds[i][j], p.scale, -base[i])) : 0.f;
          ds[i][j] = weight * (dp[i][j] - delta[i]);
        }
      }
      share_weights(s.weights, ds);
      add_weighted<D>(dq, s.weights, s.streamed[0]);
    }
    cp_async_wait<0>();
    store_float_rows<D>(row_pointer<T>(b.dq, b.dq_strides, seq.batch, head, seq.q_row + first), b.dq_strides.row,
                        seq.q_len - first, dq, scale);
  }
};

template <class T, int D>
struct AnyBackwardKeys : AnyBackward<T, D> {
  using Base = AnyBackward<T, D>;
  using typename Base::Smem;
  using Params = AnyArgs;
  static constexpr int kMinArch = 800, kKeys = Base::kRows, kThreads = Base::kThreads;

  SIMT_DEVICE static void load_stats(Smem& s, const BackwardParams& b, int64_t first, int valid) {
    for (int i = thread_id(); i < kStreamRows; i += kThreads) {
      s.lse[i] = i < valid ? Base::exponent_base(b.forward.lse[first + i]) : INFINITY;
      s.delta[i] = i < valid ? b.delta[first + i] : 0.f;
    }
  }

  SIMT_DEVICE static void run(const Params& args, Smem& s) {
    const BackwardParams& b = args.b;
    const ForwardParams& p = b.forward;
    const Place place = find_place(args.tiles, p.kv_heads);
    const Sequence seq = find_sequence(p, place.batch, args.fault);
    const int kv_head = place.head, first = place.tile * kKeys, heads = p.q_heads / p.kv_heads;
    if (first >= seq.k_len) return;

    const DenseOrCausal mask(p.causal, seq.q_len, seq.k_len);
    const int begin = mask.query_begin(first) / kStreamRows * kStreamRows;
    float dk[kOwnRows][kOwnChunks<D>][4] = {}, dv[kOwnRows][kOwnChunks<D>][4] = {};
    Base::template load_keys<kKeys>(s.own, args, seq, kv_head, first);
    for (int head = kv_head * heads; head < (kv_head + 1) * heads; head++)
      for (int query = begin; query < seq.q_len; query += kStreamRows) {
        sync_block();  // every warp has done with the previous tile
        Base::template load_queries<kStreamRows>(s.streamed, args, seq, head, query);
        load_stats(s, b, stats_index(p, seq, head) + query, seq.q_len - query);
        cp_async_commit();
        cp_async_wait<0>();
        sync_block();
        add_tile(s, mask, p.scale, first + own_row(), query, dk, dv);
      }
    cp_async_wait<0>();
    float scale[kOwnRows], one[kOwnRows];
    for (int i = 0; i < kOwnRows; i++) scale[i] = p.scale, one[i] = 1.f;
    const int64_t row = seq.k_row + first;
    store_float_rows<D>(row_pointer<T>(b.dk, b.dk_strides, seq.batch, kv_head, row), b.dk_strides.row,
                        seq.k_len - first, dk, scale);
    store_float_rows<D>(row_pointer<T>(b.dv, b.dv_strides, seq.batch, kv_head, row), b.dv_strides.row,
                        seq.k_len - first, dv, one);
  }

  SIMT_DEVICE static void add_tile(Smem& s, const DenseOrCausal& mask, float scale, int key, int query,
                                   float (&dk)[kOwnRows][kOwnChunks<D>][4], float (&dv)[kOwnRows][kOwnChunks<D>][4]) {
    float weights[kOwnRows][kOwnColumns], ds[kOwnRows][kOwnColumns];
    multiply_rows<D>(weights, s.own[0], s.streamed[0]);
    multiply_rows<D>(ds, s.own[1], s.streamed[1]);
#pragma unroll
    for (int j = 0; j < kOwnColumns; j++) {
      const int column = own_column() + kLanesPerRow * j;
#pragma unroll
      for (int i = 0; i < kOwnRows; i++) {
        const bool seen = query + column >= mask.query_begin(key + i);
        weights[i][j] = seen ? exp_of(fmaf(weights[i][j], scale, -s.lse[column])) : 0.f;
        ds[i][j] = weights[i][j] * (ds[i][j] - s.delta[column]);
      }
    }
    share_weights(s.weights, weights);
    add_weighted<D>(dv, s.weights, s.streamed[1]);
    share_weights(s.weights, ds);
    add_weighted<D>(dk, s.weights, s.streamed[0]);
  }
};

}  // namespace tilewise::attention
