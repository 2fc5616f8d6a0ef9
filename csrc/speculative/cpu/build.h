// Building draft trees: from a table of candidates (Token Recycling) and from sequences (n-grams).
#pragma once
#include "common/isa.h"
#include "speculative/params.h"

namespace tilewise {
namespace {

using namespace speculative;

// Nodes are added in index order; what stays unused is padding.
struct TreeWriter {
  int32_t *parent, *tokens, *n_nodes;
  int nodes, count = 0;

  TreeWriter(const NewTree& tree, int64_t b, int nodes)
      : parent(tree.parent + b * nodes), tokens(tree.tokens + b * nodes), n_nodes(tree.n_nodes + b), nodes(nodes) {}
  int add(int up, int32_t token) {
    parent[count] = up;
    tokens[count] = token;
    return count++;
  }
  void finish() {
    *n_nodes = count;
    for (; count < nodes; count++) {
      parent[count] = -2;
      tokens[count] = 0;
    }
  }
};

inline void build_from_template(const TreeFromTemplateParams& p, int64_t b) {
  TreeWriter tree(p.tree, b, p.nodes);
  int place[kMaxNodes];  // where a node of the template went, -1: dropped
  place[0] = tree.add(-1, p.root_tokens[b]);
  for (int i = 1; i < p.nodes; i++) {
    const int up = place[p.parent[i]];
    const int32_t token = up < 0 ? -1 : p.table[int64_t(tree.tokens[up]) * p.candidates + p.rank[i]];
    place[i] = token >= 0 && token < p.vocab ? tree.add(up, token) : -1;
  }
  tree.finish();
}

const char* tree_from_template(const TreeFromTemplateParams& p, const Runtime& rt) {
  parallel_for(rt, p.batch, 16, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) build_from_template(p, b);
  });
  return nullptr;
}

inline void build_from_sequences(const TreeFromSequencesParams& p, int64_t b) {
  TreeWriter tree(p.tree, b, p.nodes);
  tree.add(-1, p.root_tokens[b]);
  for (int64_t w = 0; w < p.width; w++) {
    const int32_t* sequence = p.sequences + (b * p.width + w) * p.length;
    int at = 0;
    for (int j = 0; j < p.length && sequence[j] >= 0; j++) {
      int child = at + 1;
      while (child < tree.count && !(tree.parent[child] == at && tree.tokens[child] == sequence[j])) child++;
      if (child == p.nodes) break;
      at = child < tree.count ? child : tree.add(at, sequence[j]);
    }
  }
  tree.finish();
}

const char* tree_from_sequences(const TreeFromSequencesParams& p, const Runtime& rt) {
  parallel_for(rt, p.batch, 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) build_from_sequences(p, b);
  });
  return nullptr;
}

// In order, on one thread: the last row of a token stays, whatever the number of threads.
const char* table_update(const TableUpdateParams& p, const Runtime&) {
  for (int64_t b = 0; b < p.batch; b++) {
    const int count = p.n_nodes ? p.n_nodes[b] : p.nodes;
    for (int64_t at = b * p.nodes; at < b * p.nodes + count; at++)
      __builtin_memcpy(p.table + int64_t(p.tokens[at]) * p.candidates, p.topk + at * p.candidates,
                       size_t(p.candidates) * sizeof(int32_t));
  }
  return nullptr;
}

}  // namespace
}  // namespace tilewise
