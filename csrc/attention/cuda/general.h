// The third mask: every rule of struct Rules, decided at run time by branches that whole blocks take alike. It bounds
// tiles by windows and skips those that the block mask or the gap behind the global tokens hides; what is left it
// adjusts, a warp's fragment at a time: scale, softcap, bias, ALiBi, then -inf where hidden. Its warps own 16 rows,
// which leaves registers for all that.
//
// Hidden keys and dropped weights are bits, made by seen() and kept() for 8 to 32 keys of a query at once. A warp's
// fragment has four times as many bits as its lanes would each need: every lane makes a share, shuffles hand it round.
#pragma once
#include "attention/cuda/dropout.h"
#include "attention/cuda/sequence.h"

namespace tilewise::attention {

// Bits [0, n) of a word, for any n.
SIMT_DEVICE uint32_t lowest_bits(int n) {
  return n <= 0 ? 0 : n >= 32 ? 0xffffffffu : (1u << n) - 1;
}

struct General {
  static constexpr bool kGeneral = true, kLongestTileLast = true;
  static constexpr int kFar = 1 << 29;  // beyond every key
  // d score / d (scale q k^T), where softcap bends it.
  template <int N>
  struct Slopes {
    float at[N][4];
  };

  const ForwardParams& p;
  const Rules& rules;
  int q_len, k_len, sequence, head;

  SIMT_DEVICE General(const ForwardParams& params, const Work& w)
      : p(params), rules(params.rules), q_len(w.seq.q_len), k_len(w.seq.k_len), sequence(w.sequence), head(w.head) {}

  // ---- numbers ----
  SIMT_DEVICE int shift() const { return k_len - q_len; }
  SIMT_DEVICE int left() const { return rules.window_left == kUnlimited ? kFar : rules.window_left; }
  SIMT_DEVICE int right() const { return p.causal ? 0 : rules.window_right == kUnlimited ? kFar : rules.window_right; }
  SIMT_DEVICE float softmax_scale(float) const { return 1.f; }
  SIMT_DEVICE float sink() const { return rules.sink_logits ? rules.sink_logits[head] : -INFINITY; }
  SIMT_DEVICE bool drops() const { return rules.dropout_threshold > 0; }
  // What the weights that are left are multiplied by.
  SIMT_DEVICE float weight_scale() const {
    return rules.dropout_threshold < 65536 ? 65536.f / static_cast<float>(65536 - rules.dropout_threshold) : 0.f;
  }

  // ---- whole tiles ----
  SIMT_DEVICE int key_begin(int q_begin) const { return max_of(0, q_begin + shift() - left()); }
  SIMT_DEVICE int key_end(int q_end) const {
    return max_of(0, min_of(k_len, min_of(q_end, q_len) + shift() + right()));
  }
  SIMT_DEVICE int full_key_end(int) const { return 0; }
  SIMT_DEVICE int query_begin(int key) const { return max_of(0, key - shift() - right()); }
  SIMT_DEVICE int query_end(int k_begin, int k_end) const {
    return k_begin < rules.global_tokens ? q_len : min_of(q_len, k_end - shift() + left());
  }
  SIMT_DEVICE int full_query_begin(int) const { return kFar; }

  // Whether the block mask hides a whole tile. Every lane looks at one block.
  template <int Queries, int Keys>
  SIMT_DEVICE bool blocked(int query, int key) const {
    static_assert(Queries / 16 * (Keys / 16) <= kWarp, "a lane for every block");
    if (!rules.blocks) return false;
    const int row = query / rules.block_q, rows = (min_of(query + Queries, q_len) - 1) / rules.block_q - row + 1;
    const int column = key / rules.block_k, columns = (min_of(key + Keys, k_len) - 1) / rules.block_k - column + 1;
    const int down = lane_id() / columns, across = lane_id() % columns;
    return !warp_any(down < rows && block_row(row + down)[column + across]);
  }
  template <int Queries, int Keys>
  SIMT_DEVICE int tile_below(int query, int tile) const {
    do {
      tile--;
      if (in_gap<Keys>(query, tile)) tile = ceil_div(rules.global_tokens, Keys) - 1;
    } while (tile >= 0 && blocked<Queries, Keys>(query, tile * Keys));
    return tile;
  }
  template <int Queries, int Keys>
  SIMT_DEVICE int tile_above(int query, int tile, int end) const {
    do {
      tile++;
      if (in_gap<Keys>(query, tile)) tile = key_begin(query) / Keys;
    } while (tile < end && blocked<Queries, Keys>(query, tile * Keys));
    return tile;
  }

  // ---- bits of consecutive keys: Count is 8, 16 or 32, `key` a multiple of it ----
  template <int Count>
  SIMT_DEVICE uint32_t seen(int query, int key) const {
    if (query >= q_len || key >= k_len) return 0;
    const int diagonal = query + shift() - key;
    uint32_t bits = lowest_bits(min_of(Count, min_of(k_len - key, diagonal + right() + 1))) &
                    (~lowest_bits(diagonal - left()) | lowest_bits(rules.global_tokens - key));
    if (rules.mask)
      bits &= rules.mask[sequence * rules.mask_batch + head * rules.mask_head + query * rules.mask_row + key / 32] >>
              (key % 32);
    if (rules.blocks) {
      const uint8_t* row = block_row(query / rules.block_q);
#pragma unroll
      for (int n = 0; n < Count; n += 16)
        if (key + n < k_len && !row[(key + n) / rules.block_k]) bits &= ~(0xffffu << n);
    }
    return bits;
  }
  template <int Count>
  SIMT_DEVICE uint32_t kept(int query, int key) const {
    const uint64_t seed = static_cast<uint64_t>(rules.dropout_seed[0]);
    uint32_t bits = 0;
#pragma unroll
    for (int n = 0; n < Count; n += kDrawnKeys)
      bits |= kept_of(philox(seed, (key + n) / kDrawnKeys, query, sequence * p.q_heads + head), rules.dropout_threshold)
              << n;
    return bits;
  }
  // Whether these queries see all these keys.
  SIMT_DEVICE bool all_seen(int query, int queries, int key, int keys) const {
    const int first = query + shift(), last = first + queries - 1;
    return !rules.mask && !rules.blocks && query + queries <= q_len && key + keys <= k_len &&
           key + keys - 1 <= first + right() && (key >= last - left() || key + keys <= rules.global_tokens);
  }

  // ---- fragments of 16 x 8 N scores: rows are queries (adjust_keys) or keys (adjust_queries) ----
  template <class T, bool Masked, int N>
  SIMT_DEVICE void adjust_keys(float (&scores)[1][N][4], int query, int key, Slopes<N>* slopes = nullptr) const {
    adjust<T, false>(scores[0], query, key, slopes);
  }
  template <class T, bool Masked, int N>
  SIMT_DEVICE void adjust_queries(float (&scores)[1][N][4], int query, int key, Slopes<N>* slopes = nullptr) const {
    adjust<T, true>(scores[0], query, key, slopes);
  }
  template <int N>
  SIMT_DEVICE void drop_keys(float (&weights)[1][N][4], int query, int key) const {
    drop<false>(weights[0], query, key);
  }
  template <int N>
  SIMT_DEVICE void drop_queries(float (&weights)[1][N][4], int query, int key) const {
    drop<true>(weights[0], query, key);
  }
  template <int N>
  SIMT_DEVICE void scale_weights(float (&weights)[1][N][4]) const {
    if (drops()) transform(weights[0], [=](float x, int, int) { return x * weight_scale(); });
  }
  template <int N>
  SIMT_DEVICE void follow(float (&gradients)[1][N][4], const Slopes<N>& slopes) const {
    if (rules.softcap > 0) transform(gradients[0], [&](float x, int j, int e) { return x * slopes.at[j][e]; });
  }

  // ---- single scores, for kernels without fragments ----
  // x = scale q k^T with softcap, bias and ALiBi; `slope` is the derivative. The query and the key exist.
  template <class T>
  SIMT_DEVICE float score(float x, int query, int key, float* slope) const {
    *slope = 1.f;
    if (rules.softcap > 0) {
      const float y = tanhf(x / rules.softcap);
      x = rules.softcap * y;
      *slope = 1.f - y * y;
    }
    if (rules.bias) x += rules.bias_type == Type::f32 ? bias<float>(query, key) : bias<T>(query, key);
    if (rules.alibi_slopes) x -= alibi() * fabsf(static_cast<float>(key - query - shift()));
    return x;
  }

 private:
  SIMT_DEVICE const uint8_t* block_row(int row) const {
    return rules.blocks + sequence * rules.blocks_batch + head * rules.blocks_head + row * rules.blocks_row;
  }
  template <class B>
  SIMT_DEVICE float bias(int query, int key) const {
    const B* of_head = static_cast<const B*>(rules.bias) + sequence * rules.bias_batch + head * rules.bias_head;
    return to_float(of_head[query * rules.bias_row + key * rules.bias_key]);
  }
  SIMT_DEVICE float alibi() const { return rules.alibi_slopes[sequence * rules.alibi_batch + head]; }
  // Whether a tile stands between the global tokens and the windows of all queries from `query` on.
  template <int Keys>
  SIMT_DEVICE bool in_gap(int query, int tile) const {
    return (tile + 1) * Keys <= key_begin(query) && tile * Keys >= rules.global_tokens;
  }

  template <int N, class Fn>
  SIMT_DEVICE static void transform(float (&x)[N][4], Fn fn) {
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) x[j][e] = fn(x[j][e], j, e);
  }
  // fn(x, query, key), both relative to the fragment.
  template <bool Transposed, int N, class Fn>
  SIMT_DEVICE static void transform_at(float (&x)[N][4], Fn fn) {
    const int g = lane_id() >> 2, t = lane_id() & 3;
    transform(x, [=](float score, int j, int e) {
      const int row = g + 8 * (e / 2), column = 8 * j + 2 * t + e % 2;
      return fn(score, Transposed ? column : row, Transposed ? row : column);
    });
  }

  template <class T, bool Transposed, int N>
  SIMT_DEVICE void adjust(float (&x)[N][4], int query, int key, Slopes<N>* slopes) const {
    transform(x, [=](float s, int, int) { return s * p.scale; });
    if (rules.softcap > 0) bend(x, slopes);
    if (rules.bias && rules.bias_type == Type::f32)
      add_bias<float, Transposed>(x, query, key);
    else if (rules.bias)
      add_bias<T, Transposed>(x, query, key);
    if (rules.alibi_slopes) {
      const float slope = alibi();
      const int diagonal = query + shift() - key;
      transform_at<Transposed>(
          x, [=](float s, int q, int k) { return s - slope * fabsf(static_cast<float>(k - q - diagonal)); });
    }
    if (!all_seen(query, Transposed ? 8 * N : 16, key, Transposed ? 16 : 8 * N))
      overwrite<Transposed>(x, query, key, -INFINITY, [this](int q, int k) { return seen<4 * N>(q, k); });
  }

  // tanh(y) = 1 - 2 / (exp(2 y) + 1): no more than 2^-23 off, where tanh.approx is off by 2^-11 of scores up to
  // softcap.
  template <int N>
  SIMT_DEVICE void bend(float (&x)[N][4], Slopes<N>* slopes) const {
    const float cap = rules.softcap, factor = 2 * kLog2e / cap;
    transform(x, [=](float s, int j, int e) {
      const float y = 1.f - 2.f * rcp_approx(exp2_approx(s * factor) + 1.f);
      if (slopes) slopes->at[j][e] = 1.f - y * y;
      return cap * y;
    });
  }

  template <class B, bool Transposed, int N>
  SIMT_DEVICE void add_bias(float (&x)[N][4], int query, int key) const {
    transform_at<Transposed>(x, [=](float s, int q, int k) {
      return s + bias<B>(min_of(query + q, q_len - 1), min_of(key + k, k_len - 1));
    });
  }

  template <bool Transposed, int N>
  SIMT_DEVICE void drop(float (&weights)[N][4], int query, int key) const {
    if (drops()) overwrite<Transposed>(weights, query, key, 0.f, [this](int q, int k) { return kept<4 * N>(q, k); });
  }

  // Puts `value` where bits(query, key), which answers for 4 N keys, has zeros.
  template <bool Transposed, int N, class Bits>
  SIMT_DEVICE static void overwrite(float (&x)[N][4], int query, int key, float value, Bits bits) {
    const int lane = lane_id(), g = lane >> 2, t = lane & 3;
    if constexpr (!Transposed) {  // lane l: row l % 16, the left or right half of the columns
      const uint32_t own = bits(query + lane % 16, key + lane / 16 * 4 * N);
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const uint32_t word = shfl(own, 16 * half + 8 * h + g) >> 2 * t;
#pragma unroll
          for (int j = 0; j < N / 2; j++)
#pragma unroll
            for (int c = 0; c < 2; c++)
              if (!(word >> (8 * j + c) & 1)) x[half * (N / 2) + j][2 * h + c] = value;
        }
    } else {  // lane l: column l, all rows; or column l % 16, the upper or lower half of the rows
      static_assert(N == 2 || N == 4, "16 or 32 queries");
      const uint32_t own = bits(query + lane % (8 * N), key + lane / (8 * N) * 8);
#pragma unroll
      for (int j = 0; j < N; j++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const int from = 8 * j + 2 * t + c;
          uint32_t word = shfl(own, from);
          if (N == 2) word |= shfl(own, from + 16) << 8;
          if (!(word >> g & 1)) x[j][c] = value;
          if (!(word >> (g + 8) & 1)) x[j][2 + c] = value;
        }
    }
  }
};

}  // namespace tilewise::attention
