// Where the rows of a sequence stand in the page pool. A position or page that does not exist is reported and skipped.
#pragma once
#include "common/paged/params.h"
#include "simt/simt.h"

namespace tilewise::paged {

using namespace simt;

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

}  // namespace tilewise::paged
