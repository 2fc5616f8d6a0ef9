// What a kernel does with an index that the host could not check: reports it, and goes on with a safe one.
#pragma once
#include "simt/simt.h"
#include "speculative/params.h"

namespace tilewise::speculative {

using namespace simt;

// n_nodes[b] brought into [least, nodes]; null counts stand for all nodes.
SIMT_DEVICE int checked_count(const int32_t* n_nodes, int b, int nodes, int least, uint32_t* fault) {
  const int count = n_nodes ? n_nodes[b] : nodes;
  if (count >= least && count <= nodes) return count;
  *fault = kBadTreeNodeCount;
  return count < least ? least : nodes;
}

// The row of `position` in the page pool, counted in slots; -1 if there is none.
SIMT_DEVICE int64_t slot_of(const BlockTable& table, int b, int64_t position, uint32_t* fault) {
  if (position < 0 || position >= (int64_t)table.pages_per_row * table.page_size) {
    *fault = kBadSeqLen;
    return -1;
  }
  const int page = table.pages[b * table.row_stride + (int)position / table.page_size];
  if (page < 0 || page >= table.pool) {
    *fault = kBadBlockTable;
    return -1;
  }
  return (int64_t)page * table.page_size + (int)position % table.page_size;
}

SIMT_DEVICE int64_t slot_offset(int64_t slot, int page_size, const PageStrides& s) {
  return slot / page_size * s.page + slot % page_size * s.slot;
}

}  // namespace tilewise::speculative
