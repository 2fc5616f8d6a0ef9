// Speculative decoding with token trees. B batch, N nodes per tree (N <= 256), W = ceil(N / 64) words of ancestor bits.
//
// A tree is `parent` i32[B, N]: node 0 is the root (parent -1), every other node's parent precedes it, slots from
// n_nodes[b] on are padding (-2). Node 0 stands for the last committed token.
#pragma once
#include "tilewise/tensor.h"

namespace tilewise {

constexpr int kMaxTreeNodes = 256;

// Derives from `parent` what the other operators read:
//   positions     i32[B, N]     seq_lens[b] + depth; -1 for padding
//   first_child   i32[B, N]     smallest child index, or -1
//   next_sibling  i32[B, N]     next node with the same parent, or -1
//   ancestor_bits u64|i64[B, N, W]  bit j: node j is an ancestor of the node, or the node itself
void tree_finalize(const Tensor& parent, const Tensor& n_nodes, const Tensor& seq_lens, const Tensor& positions,
                   const Tensor& first_child, const Tensor& next_sibling, const Tensor& ancestor_bits,
                   void* stream = nullptr);

}  // namespace tilewise
