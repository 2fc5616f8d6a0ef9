// Where the rows of a sequence stand in the page pool. A position or page that does not exist is reported and skipped.
#pragma once
#include "common/paged/params.h"
#include "simt/simt.h"

namespace tilewise::paged {

using namespace simt;

// Entry `index` of a sequence's pages, which the table has; -1 if the pool has no such page. Without pages, sequence b
// is page b.
SIMT_DEVICE int page_at(const BlockTable& table, int b, int index, uint32_t* fault) {
  if (!table.pages) return b;
  const int page = table.pages[b * table.row_stride + index];
  if (page >= 0 && page < table.pool) return page;
  *fault = kBadBlockTable;
  return -1;
}
// The page of `position`.
SIMT_DEVICE int page_of(const BlockTable& table, int b, int position, uint32_t* fault) {
  return page_at(table, b, position / table.page_size, fault);
}

// Where `position` stands; page -1 if there is no such place.
struct Place {
  int page, slot;

  SIMT_DEVICE int64_t offset(const PageStrides& s) const { return page * s.page + slot * s.slot; }
};
SIMT_DEVICE Place place_of(const BlockTable& table, int b, int64_t position, uint32_t* fault) {
  if (position < 0 || position >= (int64_t)table.pages_per_row * table.page_size) {
    *fault = kBadSeqLen;
    return {-1, 0};
  }
  return {page_of(table, b, (int)position, fault), (int)position % table.page_size};
}

// The row of `position` in the page pool, counted in slots; -1 if there is none.
SIMT_DEVICE int64_t slot_of(const BlockTable& table, int b, int64_t position, uint32_t* fault) {
  const Place place = place_of(table, b, position, fault);
  return place.page < 0 ? -1 : (int64_t)place.page * table.page_size + place.slot;
}

// The length of a sequence, brought into [0, capacity]; null: all are full.
SIMT_DEVICE int length_of(const BlockTable& table, const int32_t* seq_lens, int b, uint32_t* fault) {
  const int64_t capacity = (int64_t)table.pages_per_row * table.page_size;
  if (!seq_lens) return (int)capacity;
  const int length = seq_lens[b];
  if (length >= 0 && length <= capacity) return length;
  *fault = kBadSeqLen;
  return length < 0 ? 0 : (int)capacity;
}

SIMT_DEVICE int64_t slot_offset(int64_t slot, int page_size, const PageStrides& s) {
  return slot / page_size * s.page + slot % page_size * s.slot;
}

}  // namespace tilewise::paged
