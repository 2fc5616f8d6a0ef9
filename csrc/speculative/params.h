// What every backend of the family receives. Plain C: the per-ISA objects include it too.
#pragma once
#include "common/runtime.h"

namespace tilewise::speculative {

constexpr int kMaxNodes = 256;
constexpr int kWordBits = 64;

struct TreeFinalizeParams {
  const int32_t* parent;    // [b, n]
  const int32_t* n_nodes;   // [b]
  const int32_t* seq_lens;  // [b]
  int32_t* positions;       // [b, n]
  int32_t* first_child;     // [b, n]
  int32_t* next_sibling;    // [b, n]
  uint64_t* ancestor_bits;  // [b, n, words]
  int batch, nodes, words;
};

// The family's kernels on one machine; null = not available there.
struct Kernels {
  KernelFn<TreeFinalizeParams> tree_finalize;
};

}  // namespace tilewise::speculative
