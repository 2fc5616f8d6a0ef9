// Tree attention: a node sees the prefix, and the tree's own nodes by its bits.
#pragma once
#include "common/paged/cuda/launch.h"
#include "speculative/cuda/faults.h"

namespace tilewise::speculative {

struct TreeVisibility {
  using Params = TreeAttentionParams;
  // A node's bits as 32-bit words, with room for the node numbers of a whole key tile past the last node.
  static constexpr int kWords = (kMaxNodes + 64) / 32;
  int prefix, first = 0, end;

  SIMT_DEVICE TreeVisibility(const Params& p, int b, int first_node, int last_node, uint32_t* fault) {
    int used = 0;  // every warp finds it for itself
    for (int node = first_node + lane_id(); node <= last_node; node += kWarp) {
      const int seen = nodes_seen(p, b, node);
      used = seen > used ? seen : used;
    }
    used = redux_max(used);
    prefix = checked_prefix(p, b, used, fault);
    end = used ? prefix + used : 0;  // padding only: no keys
  }
  SIMT_DEVICE bool full(int key, int count) const { return key + count <= prefix; }

  SIMT_DEVICE static const uint32_t* words_of(const Params& p, int b, int node) {
    return reinterpret_cast<const uint32_t*>(p.ancestor_bits + ((int64_t)b * p.tokens + node) * p.words);
  }
  SIMT_DEVICE static uint32_t load_word(const Params& p, int b, int node, int w) {
    return w < 2 * p.words ? words_of(p, b, node)[w] : 0;
  }

  struct Row {
    const uint32_t* words;
    int prefix;

    SIMT_DEVICE bool sees(int key) const {
      const int node = key - prefix;
      return node < 0 || words[node >> 5] >> (node & 31) & 1;
    }
    SIMT_DEVICE bool blind() const {
      uint32_t any = 0;
      for (int w = 0; w < kWords; w++) any |= words[w];
      return any == 0;
    }
  };
  SIMT_DEVICE Row row(int, const uint32_t* words) const { return {words, prefix}; }

 private:
  // 1 + the highest node that `node` sees; 0 for padding.
  SIMT_DEVICE static int nodes_seen(const Params& p, int b, int node) {
    const uint32_t* words = words_of(p, b, node);
    for (int w = 2 * p.words - 1; w >= 0; w--)
      if (words[w]) return w * 32 + 32 - clz(words[w]) < p.tokens ? w * 32 + 32 - clz(words[w]) : p.tokens;
    return 0;
  }
  // prefix_len[b] brought into [0, capacity - used]: positions beyond the block table do not exist.
  SIMT_DEVICE static int checked_prefix(const Params& p, int b, int used, uint32_t* fault) {
    const int64_t capacity = (int64_t)p.table.pages_per_row * p.table.page_size;
    const int prefix = p.prefix_len[b];
    if (prefix >= 0 && prefix + (int64_t)used <= capacity) return prefix;
    *fault = kBadSeqLen;
    return prefix < 0 || used > capacity ? 0 : (int)(capacity - used);
  }
};

}  // namespace tilewise::speculative
