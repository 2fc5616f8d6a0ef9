// Tree links on the GPU: one block per tree, one thread per node.
#pragma once
#include "simt/simt.h"
#include "speculative/params.h"

namespace tilewise::speculative {

using namespace simt;

struct TreeFinalize {
  static constexpr int kThreads = kMaxNodes, kMinArch = 800;
  struct Params {
    TreeFinalizeParams p;
    uint32_t* fault;
  };
  struct Smem {
    int parent[kMaxNodes];  // -1 root, -2 padding or invalid
  };

  // A node counts only if its parent precedes it: then walking up always ends.
  SIMT_DEVICE static int checked_parent(const Params& q, int b, int i) {
    const int count = q.p.n_nodes[b];
    if (count < 1 || count > q.p.nodes) *q.fault = kBadTreeNodeCount;
    if (i >= count || i >= q.p.nodes) return -2;
    const int up = q.p.parent[(int64_t)b * q.p.nodes + i];
    if (i == 0 ? up == -1 : up >= 0 && up < i) return up;
    *q.fault = kBadTreeParent;
    return i == 0 ? -1 : -2;
  }

  SIMT_DEVICE static void run(const Params& q, Smem& s) {
    const int i = thread_id(), b = (int)block_idx().x;
    s.parent[i] = checked_parent(q, b, i);
    sync_block();
    if (i < q.p.nodes) write_node(q.p, s, b, i);
  }

  SIMT_DEVICE static void write_node(const TreeFinalizeParams& p, const Smem& s, int b, int i) {
    const int64_t at = (int64_t)b * p.nodes + i;
    const bool present = s.parent[i] != -2;
    uint64_t bits[kMaxNodes / kWordBits] = {};
    int depth = 0;
    for (int a = i; present && a >= 0; a = s.parent[a]) {
#pragma unroll
      for (int w = 0; w < kMaxNodes / kWordBits; w++)  // constant indices keep the words in registers
        bits[w] |= (uint64_t)(a / kWordBits == w) << a % kWordBits;
      depth += s.parent[a] >= 0;
    }
    int child = -1, sibling = -1;
    for (int j = p.nodes - 1; j > i; j--) {  // downwards, so that the smallest index wins
      if (s.parent[j] == i) child = j;
      if (present && s.parent[j] >= 0 && s.parent[j] == s.parent[i]) sibling = j;
    }
    p.positions[at] = present ? p.seq_lens[b] + depth : -1;
    p.first_child[at] = child;
    p.next_sibling[at] = sibling;
#pragma unroll
    for (int w = 0; w < kMaxNodes / kWordBits; w++)
      if (w < p.words) p.ancestor_bits[at * p.words + w] = bits[w];
  }
};

}  // namespace tilewise::speculative
