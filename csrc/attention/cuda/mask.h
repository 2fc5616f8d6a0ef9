// Which keys a query sees, as small policy types. A mask answers for single rows, so that a comparison with a constant
// is left per score, and bounds whole tiles, so that the kernels skip tiles that nobody sees and leave the masking out
// of tiles that everybody sees.
//
//   key_limit(query)        the query sees the keys below this
//   query_begin(key)        the key is seen by the queries from here on (keys past the end: anything)
//   key_end(q_end)          no query below q_end sees a key from here on
//   full_key_end(q_begin)   all queries from q_begin on see all keys below this
//   full_query_begin(k_end) all queries from here on see all keys below k_end
#pragma once
#include "attention/cuda/sequence.h"

namespace tilewise::attention {

struct Dense {
  static constexpr bool kLongestTileLast = false;
  int q_len, k_len;

  SIMT_DEVICE int key_limit(int) const { return k_len; }
  SIMT_DEVICE int query_begin(int) const { return 0; }
  SIMT_DEVICE int key_end(int) const { return k_len; }
  SIMT_DEVICE int full_key_end(int) const { return k_len; }
  SIMT_DEVICE int full_query_begin(int) const { return 0; }
};

// Bottom-right aligned: the last query sees the last key.
struct Causal {
  static constexpr bool kLongestTileLast = true;
  int q_len, k_len;

  SIMT_DEVICE int shift() const { return k_len - q_len; }
  SIMT_DEVICE int key_limit(int query) const { return min_of(k_len, query + shift() + 1); }
  SIMT_DEVICE int query_begin(int key) const { return max_of(0, key - shift()); }
  SIMT_DEVICE int key_end(int q_end) const { return max_of(0, min_of(q_end, q_len) + shift()); }
  SIMT_DEVICE int full_key_end(int q_begin) const { return max_of(0, q_begin + shift() + 1); }
  SIMT_DEVICE int full_query_begin(int k_end) const { return max_of(0, k_end - 1 - shift()); }
};

// Either of the two, chosen at run time: for kernels whose time is not decided by a branch.
struct DenseOrCausal {
  bool is_causal;
  Dense dense;
  Causal causal;

  SIMT_DEVICE DenseOrCausal(bool is_causal, int q_len, int k_len)
      : is_causal(is_causal), dense{q_len, k_len}, causal{q_len, k_len} {}
  SIMT_DEVICE int key_limit(int query) const { return is_causal ? causal.key_limit(query) : dense.key_limit(query); }
  SIMT_DEVICE int query_begin(int key) const { return is_causal ? causal.query_begin(key) : dense.query_begin(key); }
  SIMT_DEVICE int key_end(int q_end) const { return is_causal ? causal.key_end(q_end) : dense.key_end(q_end); }
};

}  // namespace tilewise::attention
