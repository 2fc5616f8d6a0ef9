// Tree links: one pass over the nodes in index order, which is also an order of ancestors before descendants.
#pragma once
#include "common/isa.h"
#include "speculative/params.h"

namespace tilewise {
namespace {

using namespace speculative;

inline void finalize_one_tree(const TreeFinalizeParams& p, int64_t b) {
  const int32_t* parent = p.parent + b * p.nodes;  // [n]
  int32_t* positions = p.positions + b * p.nodes;
  int32_t* first_child = p.first_child + b * p.nodes;
  int32_t* next_sibling = p.next_sibling + b * p.nodes;
  uint64_t* bits = p.ancestor_bits + b * p.nodes * p.words;  // [n, words]
  int32_t last_child[kMaxNodes];
  const int count = p.n_nodes[b];
  for (int i = 0; i < p.nodes; i++) {
    const int up = i < count ? parent[i] : -1;
    first_child[i] = next_sibling[i] = last_child[i] = -1;
    positions[i] = i >= count ? -1 : up < 0 ? p.seq_lens[b] : positions[up] + 1;
    for (int w = 0; w < p.words; w++) bits[i * p.words + w] = up < 0 ? 0 : bits[up * p.words + w];
    if (i < count) bits[i * p.words + i / kWordBits] |= uint64_t(1) << i % kWordBits;
    if (up < 0) continue;
    if (last_child[up] < 0)
      first_child[up] = i;
    else
      next_sibling[last_child[up]] = i;
    last_child[up] = i;
  }
}

const char* tree_finalize(const TreeFinalizeParams& p, const Runtime& rt) {
  parallel_for(rt, p.batch, 16, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) finalize_one_tree(p, b);
  });
  return nullptr;
}

}  // namespace
}  // namespace tilewise
