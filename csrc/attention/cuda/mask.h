// Which keys a query sees, as small policy types. A mask answers for single rows, so that a comparison with a constant
// is left per score, and bounds whole tiles, so that the kernels skip tiles that nobody sees and leave the masking out
// of tiles that everybody sees. Dense and Causal serve the two common cases at no cost; General (general.h) has every
// rule and adjusts the scores besides.
//
//   key_limit(query)        the query sees the keys below this
//   query_begin(key)        the key is seen by the queries from here on (keys past the end: anything)
//   key_end(q_end)          no query below q_end sees a key from here on
//   full_key_end(q_begin)   all queries from q_begin on see all keys below this
//   full_query_begin(k_end) all queries from here on see all keys below k_end
//   tile_below, tile_above  the next tile of keys down or up from `tile` that the block's queries may see
//   softmax_scale(scale)    what turns scores as adjust_* leaves them into natural units
//   adjust_keys, adjust_queries   a warp's scores with queries or keys as rows: -inf where hidden
//   drop_keys, drop_queries       its weights, 0 where dropped
//   scale_weights           makes up for the weights that were dropped
//   follow                  multiplies gradients by the slopes that adjust_* left
#pragma once
#include "attention/cuda/sequence.h"

namespace tilewise::attention {

// What adjust_* leaves for the gradient of the scores: nothing here.
struct NoSlopes {};

// -inf for the keys that the query of a row does not see.
template <class Mask, int M, int N>
SIMT_DEVICE void hide_keys(float (&scores)[M][N][4], const Mask& mask, int query, int key) {
  const int g = lane_id() >> 2, t = lane_id() & 3;
#pragma unroll
  for (int i = 0; i < M; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int limit = mask.key_limit(query + 16 * i + 8 * h + g) - key - 2 * t;
#pragma unroll
      for (int j = 0; j < N; j++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          if (8 * j + e >= limit) scores[i][j][2 * h + e] = -INFINITY;
    }
}

template <class Mask>
struct SimpleMask {
  static constexpr bool kGeneral = false;
  template <int N>
  using Slopes = NoSlopes;

  SIMT_DEVICE float softmax_scale(float scale) const { return scale; }
  SIMT_DEVICE int query_end(int, int) const { return self().q_len; }
  template <int Queries, int Keys>
  SIMT_DEVICE bool blocked(int, int) const {
    return false;
  }
  template <int Queries, int Keys>
  SIMT_DEVICE int tile_below(int, int tile) const {
    return tile - 1;
  }
  template <int Queries, int Keys>
  SIMT_DEVICE int tile_above(int, int tile, int) const {
    return tile + 1;
  }

  template <class T, bool Masked, int M, int N>
  SIMT_DEVICE void adjust_keys(float (&scores)[M][N][4], int query, int key, NoSlopes* = nullptr) const {
    if (Masked) hide_keys(scores, self(), query, key);
  }
  template <class T, bool Masked, int M, int N>
  SIMT_DEVICE void adjust_queries(float (&scores)[M][N][4], int query, int key, NoSlopes* = nullptr) const {
    if (!Masked) return;
    const int g = lane_id() >> 2, t = lane_id() & 3;
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int begin = self().query_begin(key + 16 * i + 8 * h + g) - query - 2 * t;
#pragma unroll
        for (int j = 0; j < N; j++)
#pragma unroll
          for (int e = 0; e < 2; e++)
            if (8 * j + e < begin) scores[i][j][2 * h + e] = -INFINITY;
      }
  }
  template <int N, int M>
  SIMT_DEVICE void drop_keys(float (&)[M][N][4], int, int) const {}
  template <int N, int M>
  SIMT_DEVICE void drop_queries(float (&)[M][N][4], int, int) const {}
  template <int N, int M>
  SIMT_DEVICE void scale_weights(float (&)[M][N][4]) const {}
  template <int N, int M>
  SIMT_DEVICE void follow(float (&)[M][N][4], const NoSlopes&) const {}

 private:
  SIMT_DEVICE const Mask& self() const { return static_cast<const Mask&>(*this); }
};

struct Dense : SimpleMask<Dense> {
  static constexpr bool kLongestTileLast = false;
  int q_len, k_len;

  SIMT_DEVICE Dense(const ForwardParams&, const Work& w) : q_len(w.seq.q_len), k_len(w.seq.k_len) {}
  SIMT_DEVICE int key_limit(int) const { return k_len; }
  SIMT_DEVICE int query_begin(int) const { return 0; }
  SIMT_DEVICE int key_end(int) const { return k_len; }
  SIMT_DEVICE int full_key_end(int) const { return k_len; }
  SIMT_DEVICE int full_query_begin(int) const { return 0; }
};

// Bottom-right aligned: the last query sees the last key.
struct Causal : SimpleMask<Causal> {
  static constexpr bool kLongestTileLast = true;
  int q_len, k_len;

  SIMT_DEVICE Causal(const ForwardParams&, const Work& w) : q_len(w.seq.q_len), k_len(w.seq.k_len) {}
  SIMT_DEVICE int shift() const { return k_len - q_len; }
  SIMT_DEVICE int key_limit(int query) const { return min_of(k_len, query + shift() + 1); }
  SIMT_DEVICE int query_begin(int key) const { return max_of(0, key - shift()); }
  SIMT_DEVICE int key_end(int q_end) const { return max_of(0, min_of(q_end, q_len) + shift()); }
  SIMT_DEVICE int full_key_end(int q_begin) const { return max_of(0, q_begin + shift() + 1); }
  SIMT_DEVICE int full_query_begin(int k_end) const { return max_of(0, k_end - 1 - shift()); }
};

}  // namespace tilewise::attention
