// Building draft trees on the GPU: one block per tree.
#pragma once
#include "speculative/cuda/faults.h"

namespace tilewise::speculative {

SIMT_DEVICE void write_node(const NewTree& tree, int64_t at, int parent, int token) {
  tree.parent[at] = parent;
  tree.tokens[at] = token;
}

// One thread per node. A level's tokens need the level above; the nodes that have one then move up in order.
struct TreeFromTemplate {
  static constexpr int kThreads = kMaxNodes, kMinArch = 800, kWarps = kThreads / kWarp;
  struct Params {
    TreeFromTemplateParams p;
    uint32_t* fault;
  };
  struct Smem {
    int parent[kMaxNodes];  // -1: the root, or a node that is left out
    int token[kMaxNodes];   // -1: no candidate
    int place[kMaxNodes];   // index among the nodes that stay
    int kept[kWarps], deepest[kWarps];
  };

  SIMT_DEVICE static int checked_parent(const Params& q, int i) {
    if (i >= q.p.nodes) return -1;
    const int up = q.p.parent[i];
    if (i == 0 ? up == -1 : up >= 0 && up < i) return up;
    *q.fault = kBadTreeParent;
    return -1;
  }
  SIMT_DEVICE static int valid_token(const Params& q, int token) {
    return token >= 0 && token < q.p.vocab ? token : -1;
  }
  SIMT_DEVICE static int candidate(const Params& q, int i, int after) {
    const int rank = q.p.rank[i];
    if (rank < 0 || rank >= q.p.candidates) *q.fault = kBadTreeParent;
    if (after < 0 || rank < 0 || rank >= q.p.candidates) return -1;
    return valid_token(q, q.p.table[(int64_t)after * q.p.candidates + rank]);
  }

  SIMT_DEVICE static void run(const Params& q, Smem& s) {
    const int i = thread_id(), b = (int)block_idx().x;
    s.parent[i] = checked_parent(q, i);
    s.token[i] = i == 0 ? valid_token(q, q.p.root_tokens[b]) : -1;
    if (i == 0 && s.token[0] < 0) *q.fault = kBadTreeParent;
    sync_block();
    int depth = 0;
    for (int a = i; s.parent[a] >= 0; a = s.parent[a]) depth++;
    const int deepest = warp_max(depth);
    if (lane_id() == 0) s.deepest[warp_id()] = deepest;
    sync_block();
    int levels = 0;
    for (int w = 0; w < kWarps; w++) levels = s.deepest[w] > levels ? s.deepest[w] : levels;
    for (int level = 1; level <= levels; level++) {
      if (depth == level) s.token[i] = candidate(q, i, s.token[s.parent[i]]);
      sync_block();
    }
    write(q.p.tree, s, b, q.p.nodes);
  }

  SIMT_DEVICE static void write(const NewTree& tree, Smem& s, int b, int nodes) {
    const int i = thread_id(), token = s.token[i];
    const uint32_t kept = warp_ballot(token >= 0);
    if (lane_id() == 0) s.kept[warp_id()] = popc(kept);
    sync_block();
    int place = popc(kept & ((1u << lane_id()) - 1)), total = 0;
    for (int w = 0; w < kWarps; w++) {
      if (w < warp_id()) place += s.kept[w];
      total += s.kept[w];
    }
    s.place[i] = place;
    sync_block();
    const int64_t row = (int64_t)b * nodes;
    if (token >= 0) write_node(tree, row + place, i ? s.place[s.parent[i]] : -1, token);
    if (i >= total && i < nodes) write_node(tree, row + i, -2, 0);
    if (i == 0) tree.n_nodes[b] = total;
  }
};

// One warp walks the sequences in order; its lanes search the nodes so far for a child that holds the next token.
struct TreeFromSequences {
  static constexpr int kThreads = kWarp, kMinArch = 800;
  struct Params {
    TreeFromSequencesParams p;
  };
  struct Smem {
    int parent[kMaxNodes], token[kMaxNodes];
  };

  SIMT_DEVICE static int find_child(const Smem& s, int count, int up, int token) {
    for (int first = 0; first < count; first += kWarp) {
      const int i = first + lane_id();
      const uint32_t found = warp_ballot(i > up && i < count && s.parent[i] == up && s.token[i] == token);
      if (found) return first + find_first_set(found) - 1;
    }
    return -1;
  }

  SIMT_DEVICE static void add(Smem& s, int at, int parent, int token) {
    if (lane_id() == 0) {
      s.parent[at] = parent;
      s.token[at] = token;
    }
    sync_warp();
  }

  SIMT_DEVICE static void run(const Params& q, Smem& s) {
    const TreeFromSequencesParams& p = q.p;
    const int b = (int)block_idx().x;
    int count = 1;
    add(s, 0, -1, p.root_tokens[b]);
    for (int w = 0; w < p.width; w++) {
      const int32_t* sequence = p.sequences + ((int64_t)b * p.width + w) * p.length;
      int at = 0;
      for (int j = 0; j < p.length; j++) {
        const int token = sequence[j];
        if (token < 0) break;
        int child = find_child(s, count, at, token);
        if (child < 0 && count == p.nodes) break;
        if (child < 0) {
          child = count++;
          add(s, child, at, token);
        }
        at = child;
      }
    }
    for (int i = lane_id(); i < p.nodes; i += kWarp)
      write_node(p.tree, (int64_t)b * p.nodes + i, i < count ? s.parent[i] : -2, i < count ? s.token[i] : 0);
    if (lane_id() == 0) p.tree.n_nodes[b] = count;
  }
};

// One warp per row of topk; it writes unless a later row has the same token. So the last row stays, in any schedule.
struct TableUpdate {
  static constexpr int kThreads = 256, kMinArch = 800;
  struct Params {
    TableUpdateParams p;
    uint32_t* fault;
  };
  struct Smem {};

  SIMT_DEVICE static bool counts(const Params& q, int row) {
    const int b = row / q.p.nodes;
    return row % q.p.nodes < checked_count(q.p.n_nodes, b, q.p.nodes, 0, q.fault);
  }

  SIMT_DEVICE static void run(const Params& q, Smem&) {
    const TableUpdateParams& p = q.p;
    const int row = (int)block_idx().x * (kThreads / kWarp) + warp_id(), rows = p.batch * p.nodes;
    if (row >= rows || !counts(q, row)) return;
    const int token = p.tokens[row];
    if (token < 0 || token >= p.vocab) {
      *q.fault = kBadSparseIndex;
      return;
    }
    bool later = false;
    for (int i = row + 1 + lane_id(); i < rows; i += kWarp) later |= p.tokens[i] == token && counts(q, i);
    if (warp_any(later)) return;
    for (int c = lane_id(); c < p.candidates; c += kWarp)
      p.table[(int64_t)token * p.candidates + c] = p.topk[(int64_t)row * p.candidates + c];
  }
};

}  // namespace tilewise::speculative
