// Writing and moving rows of paged caches.
#pragma once
#include "common/isa.h"
#include "common/paged/cpu/cursor.h"
#include "speculative/params.h"

namespace tilewise {
namespace {

using namespace speculative;

inline int64_t row_offset(const BlockTable& table, int64_t b, int64_t position, const PageStrides& s) {
  return paged::PageCursor(table, b, position).offset(s);
}

// Copies every head's row of one token.
inline void copy_token(char* to, int64_t to_head, const char* from, int64_t from_head, int heads, int row_bytes) {
  if (to_head == row_bytes && from_head == row_bytes) {
    __builtin_memmove(to, from, size_t(heads) * row_bytes);
    return;
  }
  for (int h = 0; h < heads; h++) __builtin_memmove(to + h * to_head, from + h * from_head, row_bytes);
}

const char* append_kv(const AppendParams& p, const Runtime& rt) {
  const int64_t item = p.item_bytes;
  parallel_for(rt, int64_t(p.batch) * p.nodes, 16, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at++) {
      const int64_t b = at / p.nodes, i = at % p.nodes;
      if (p.n_nodes && i >= p.n_nodes[b]) continue;
      const int64_t position = p.start[b] + i;
      copy_token(static_cast<char*>(p.k_pages) + row_offset(p.table, b, position, p.k_strides) * item,
                 p.k_strides.head * item, static_cast<const char*>(p.k) + (b * p.k_batch + i * p.k_node) * item,
                 p.k_head * item, p.kv_heads, p.row_bytes);
      copy_token(static_cast<char*>(p.v_pages) + row_offset(p.table, b, position, p.v_strides) * item,
                 p.v_strides.head * item, static_cast<const char*>(p.v) + (b * p.v_batch + i * p.v_node) * item,
                 p.v_head * item, p.kv_heads, p.row_bytes);
    }
  });
  return nullptr;
}

// Ascending order is what makes it safe in place: a path rises, so node j of it never stands before slot j.
const char* compact_kv(const CompactParams& p, const Runtime& rt) {
  const int64_t item = p.item_bytes;
  parallel_for(rt, int64_t(p.batch) * p.tensors, 8, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at++) {
      const int64_t b = at / p.tensors;
      char* pages = static_cast<char*>(p.pages[at % p.tensors]);
      const int32_t* path = p.path + b * p.path_length;
      for (int j = 1; j <= p.accept_len[b]; j++) {
        if (path[j] == j) continue;
        copy_token(pages + row_offset(p.table, b, p.prefix_len[b] + j, p.strides) * item, p.strides.head * item,
                   pages + row_offset(p.table, b, p.prefix_len[b] + path[j], p.strides) * item, p.strides.head * item,
                   p.kv_heads, p.row_bytes);
      }
    }
  });
  return nullptr;
}

}  // namespace
}  // namespace tilewise
