// Where the rows of a sequence stand in the page pool.
#pragma once
#include "common/isa.h"
#include "common/paged/params.h"

namespace tilewise::paged {
namespace {

// Walks a sequence's positions in order without a division per position.
struct PageCursor {
  const int32_t* pages;
  int page_size, slot;

  PageCursor(const BlockTable& table, int64_t b, int64_t position)
      : pages(table.pages + b * table.row_stride + position / table.page_size),
        page_size(table.page_size),
        slot(int(position % table.page_size)) {}
  int64_t offset(const PageStrides& s) const { return *pages * s.page + slot * s.slot; }
  void next() {
    if (++slot < page_size) return;
    slot = 0;
    pages++;
  }
};

}  // namespace
}  // namespace tilewise::paged
