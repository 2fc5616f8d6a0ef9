// Which key a query sees. A mask answers for single pairs and bounds whole tiles, so that the kernels can skip tiles
// that nobody sees and leave the masking out of tiles that everybody sees.
#pragma once
#include "attention/cuda/sequence.h"

namespace tilewise::attention {

constexpr int kNever = 0x7fffffff;

struct Dense {
  static constexpr bool kLongestTileLast = false;
  int q_len, k_len;

  SIMT_DEVICE bool sees(int, int key) const { return key < k_len; }
  // Queries below q_end see no key from here on.
  SIMT_DEVICE int key_end(int) const { return k_len; }
  // Queries from q_begin on see every key below this.
  SIMT_DEVICE int full_key_end(int) const { return k_len; }
  // Queries below this see no key from k_begin on.
  SIMT_DEVICE int query_begin(int) const { return 0; }
  // Queries from here on see every key below k_end.
  SIMT_DEVICE int full_query_begin(int k_end) const { return k_end <= k_len ? 0 : kNever; }
};

// Bottom-right aligned: the last query sees the last key.
struct Causal {
  static constexpr bool kLongestTileLast = true;
  int q_len, k_len;

  SIMT_DEVICE int shift() const { return k_len - q_len; }
  SIMT_DEVICE bool sees(int query, int key) const { return key <= query + shift(); }
  SIMT_DEVICE int key_end(int q_end) const { return max_of(0, min_of(q_end, q_len) + shift()); }
  SIMT_DEVICE int full_key_end(int q_begin) const { return max_of(0, q_begin + shift() + 1); }
  SIMT_DEVICE int query_begin(int k_begin) const { return max_of(0, k_begin - shift()); }
  SIMT_DEVICE int full_query_begin(int k_end) const { return k_end <= k_len ? max_of(0, k_end - 1 - shift()) : kNever; }
};

// Either of the two, chosen at run time: for kernels whose time is not decided by a branch.
struct DenseOrCausal {
  bool is_causal;
  Dense dense;
  Causal causal;

  SIMT_DEVICE DenseOrCausal(bool is_causal, int q_len, int k_len)
      : is_causal(is_causal), dense{q_len, k_len}, causal{q_len, k_len} {}
  SIMT_DEVICE bool sees(int query, int key) const {
    return dense.sees(query, key) && (!is_causal || causal.sees(query, key));
  }
  SIMT_DEVICE int key_end(int q_end) const { return is_causal ? causal.key_end(q_end) : dense.key_end(q_end); }
  SIMT_DEVICE int query_begin(int k_begin) const { return is_causal ? causal.query_begin(k_begin) : 0; }
};

}  // namespace tilewise::attention
