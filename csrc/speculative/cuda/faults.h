// What a kernel does with an index that the host could not check: reports it, and goes on with a safe one.
#pragma once
#include "common/paged/cuda/pages.h"
#include "simt/simt.h"
#include "speculative/params.h"

namespace tilewise::speculative {

using namespace simt;
using paged::slot_of, paged::slot_offset;

// n_nodes[b] brought into [least, nodes]; null counts stand for all nodes.
SIMT_DEVICE int checked_count(const int32_t* n_nodes, int b, int nodes, int least, uint32_t* fault) {
  const int count = n_nodes ? n_nodes[b] : nodes;
  if (count >= least && count <= nodes) return count;
  *fault = kBadTreeNodeCount;
  return count < least ? least : nodes;
}

}  // namespace tilewise::speculative
