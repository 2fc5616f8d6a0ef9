// Writing and moving rows of paged caches. Rows move in chunks: 16 bytes where all addresses allow it, else one
// element.
#pragma once
#include "speculative/cuda/faults.h"

namespace tilewise::speculative {

// One thread per chunk of a head's row; grid (chunks, nodes, batch).
template <class Chunk>
struct AppendKv {
  static constexpr int kThreads = 128, kMinArch = 800;
  struct Params {
    AppendParams p;
    uint32_t* fault;
  };
  struct Smem {};

  SIMT_DEVICE static void run(const Params& q, Smem&) {
    const AppendParams& p = q.p;
    const int i = (int)block_idx().y, b = (int)block_idx().z, per_row = p.row_bytes / (int)sizeof(Chunk);
    const int at = (int)block_idx().x * kThreads + thread_id();
    if (at >= per_row * p.kv_heads || i >= checked_count(p.n_nodes, b, p.nodes, 0, q.fault)) return;
    const int64_t slot = slot_of(p.table, b, (int64_t)p.start[b] + i, q.fault);
    if (slot < 0) return;
    const int head = at / per_row, chunk = at % per_row;
    const auto copy = [&](void* to, int64_t to_row, const void* from, int64_t from_row) {
      reinterpret_cast<Chunk*>(static_cast<char*>(to) + to_row * p.item_bytes)[chunk] =
          reinterpret_cast<const Chunk*>(static_cast<const char*>(from) + from_row * p.item_bytes)[chunk];
    };
    copy(p.k_pages, slot_offset(slot, p.table.page_size, p.k_strides) + head * p.k_strides.head, p.k,
         b * p.k_batch + i * p.k_node + head * p.k_head);
    copy(p.v_pages, slot_offset(slot, p.table.page_size, p.v_strides) + head * p.v_strides.head, p.v,
         b * p.v_batch + i * p.v_node + head * p.v_head);
  }
};

// One thread moves its chunk of every accepted row, in ascending order: node path[j] never stands before slot j, so no
// row is overwritten before it has moved, and no thread waits for another. Grid (chunks, tensors, batch).
template <class Chunk>
struct CompactKv {
  static constexpr int kThreads = 128, kMinArch = 800;
  struct Params {
    CompactParams p;
    uint32_t* fault;
  };
  struct Smem {
    int64_t from[kMaxNodes], to[kMaxNodes];  // row offsets in elements
    int bad;
  };

  // Every path entry is checked before anything moves.
  SIMT_DEVICE static int checked_length(const Params& q, int b) {
    const int accepted = q.p.accept_len[b];
    if (accepted >= 0 && accepted < q.p.path_length && q.p.path[(int64_t)b * q.p.path_length] == 0) return accepted;
    *q.fault = kBadTreePath;
    return 0;
  }
  SIMT_DEVICE static bool find_rows(const Params& q, Smem& s, int b, int j) {
    const int32_t* path = q.p.path + (int64_t)b * q.p.path_length;
    if (path[j] <= path[j - 1] || path[j] >= kMaxNodes) {
      *q.fault = kBadTreePath;
      return false;
    }
    const int64_t from = slot_of(q.p.table, b, (int64_t)q.p.prefix_len[b] + path[j], q.fault);
    const int64_t to = slot_of(q.p.table, b, (int64_t)q.p.prefix_len[b] + j, q.fault);
    s.from[j] = slot_offset(from, q.p.table.page_size, q.p.strides);
    s.to[j] = slot_offset(to, q.p.table.page_size, q.p.strides);
    return from >= 0 && to >= 0;
  }

  SIMT_DEVICE static void run(const Params& q, Smem& s) {
    const CompactParams& p = q.p;
    const int b = (int)block_idx().z, per_row = p.row_bytes / (int)sizeof(Chunk);
    const int at = (int)block_idx().x * kThreads + thread_id(), accepted = checked_length(q, b);
    if (thread_id() == 0) s.bad = 0;
    sync_block();
    for (int j = 1 + thread_id(); j <= accepted; j += kThreads)
      if (!find_rows(q, s, b, j)) atomic_max(&s.bad, 1);
    sync_block();
    if (s.bad || at >= per_row * p.kv_heads) return;
    char* pages = static_cast<char*>(p.pages[block_idx().y]) + (at / per_row) * p.strides.head * p.item_bytes;
    for (int j = 1; j <= accepted; j++)
      reinterpret_cast<Chunk*>(pages + s.to[j] * p.item_bytes)[at % per_row] =
          reinterpret_cast<const Chunk*>(pages + s.from[j] * p.item_bytes)[at % per_row];
  }
};

}  // namespace tilewise::speculative
