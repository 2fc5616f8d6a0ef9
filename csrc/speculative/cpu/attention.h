// Tree attention: a node sees the prefix, and the tree's own nodes by its bits.
#pragma once
#include "common/isa.h"
#include "common/paged/cpu/attention.h"
#include "speculative/params.h"

namespace tilewise {
namespace {

using namespace speculative;

struct TreeVisibility {
  using Params = TreeAttentionParams;
  const Params& p;
  const uint64_t* bits;  // [n, words], of this sequence
  int64_t prefix;

  TreeVisibility(const Params& p, int64_t b)
      : p(p), bits(p.ancestor_bits + b * p.tokens * p.words), prefix(p.prefix_len[b]) {}

  paged::KeyRange keys(int, int) const { return {0, prefix + nodes_in_use(), 0, prefix}; }
  bool blind(int node) const {
    for (int w = 0; w < p.words; w++)
      if (bits[int64_t(node) * p.words + w]) return false;
    return true;
  }
  paged::KeyBits seen(int node, int64_t key) const {
    const uint64_t* own = bits + int64_t(node) * p.words;
    const int word = int(key - prefix) / kWordBits, shift = int(key - prefix) % kWordBits;
    const auto at = [&](int w) { return w < p.words ? own[w] : 0; };
    const auto from = [&](int w) { return at(w) >> shift | (shift ? at(w + 1) << (kWordBits - shift) : 0); };
    return {{from(word), from(word + 1)}};
  }

 private:
  // Nodes with index below this are seen by some node.
  int nodes_in_use() const {
    uint64_t any[kMaxNodes / kWordBits] = {};
    for (int64_t i = 0; i < int64_t(p.tokens) * p.words; i++) any[i % p.words] |= bits[i];
    for (int w = p.words - 1; w >= 0; w--)
      if (any[w]) return min_of(p.tokens, (w + 1) * kWordBits - __builtin_clzll(any[w]));
    return 0;
  }
};

const char* tree_attention(const TreeAttentionParams& p, const Runtime& rt) {
  return paged::attend_float_pages<TreeVisibility>(p, rt);
}

}  // namespace
}  // namespace tilewise
