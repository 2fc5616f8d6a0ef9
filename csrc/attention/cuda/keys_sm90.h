// How keys and values reach the stages of the Hopper forward kernel: BoxedKeys, by TMA, from tensors and from pages of
// many rows; GatheredKeys, by cp.async, from pages of any size. Consumers see no difference.
#pragma once
#include "attention/cuda/ring.h"
#include "attention/cuda/sequence.h"
#include "common/paged/cuda/pages.h"

namespace tilewise::attention {

struct ForwardSm90Args {
  TensorMap q, k, v, out;  // (d, rows, heads, batch) with boxes of 64 columns; out is unused for packed sequences
  ForwardParams p;
  // Of keys and values in pages, else null: their maps are (d, slots, heads, pages), a box is `box_rows` of a page.
  paged::BlockTable table;
  const int32_t* seq_lens;
  int box_rows;
  int tiles;    // of queries, per sequence and head
  int section;  // heads that are worked on together: their keys and values fit into the L2 cache
  uint32_t* fault;
};

constexpr int kForwardStages = 2;

// Where rows of a tile stand in pages: what a lane has looked up. Page -1: nowhere.
struct PagePlace {
  int page, slot;
};
SIMT_DEVICE PagePlace find_place(const ForwardSm90Args& a, const Work& w, int key) {
  const int index = key / a.table.page_size;
  return {key < w.seq.k_len ? paged::page_at(a.table, w.sequence, index, a.fault) : -1,
          key - index * a.table.page_size};
}

// One warp, whose elected lane issues the copies. Rows behind a sequence may be another's, or stale; gathered ones are
// zeros.
template <class T, int D, int Keys>
struct BoxedKeys {
  static constexpr int kWarps = 1, kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr bool kBoxed = true;
  using Stages = Ring<kForwardStages, 1>;

  const ForwardSm90Args& a;
  bool leader;

  // Every lane looks up one box, so that the loop over boxes is shuffles and copies. What the sequence or the pool does
  // not have lies outside the map: it arrives as zeros.
  SIMT_DEVICE PagePlace look_up(const Work& w, int tile) const {
    const int row = lane_id() * a.box_rows;
    const PagePlace own = a.seq_lens && row < Keys ? find_place(a, w, tile * Keys + row) : PagePlace{-1, 0};
    return own.page < 0 ? PagePlace{0, a.table.page_size} : own;
  }
  // Starts to copy a tile of the keys, or of the values.
  template <bool Values>
  SIMT_DEVICE void load(T* stages, uint64_t* full, uint64_t* empty, Stages& ring, const Work& w, int tile,
                        PagePlace own, int kv_head) {
    const int stage = ring.stage();
    ring.await_empty(empty);
    if (leader) mbar_arrive_expect_tx(&full[stage], Keys * D * sizeof(T));
    T* to = stages + stage * Keys * D;
    if (a.seq_lens)
      copy_pages<Values>(to, &full[stage], own, kv_head);
    else
      copy<Values>(to, &full[stage], static_cast<int>(w.seq.k_row) + tile * Keys, kv_head, w.seq.batch);
    ring.used++;
  }
  SIMT_DEVICE void finish() {}

 private:
  template <bool Values>
  SIMT_DEVICE void copy(T* to, uint64_t* full, int row, int head, int batch) const {
    if (!leader) return;
#pragma unroll
    for (int atom = 0; atom < D / 64; atom++)
      tma_load_4d(to + atom * Keys * 64, Values ? &a.v : &a.k, full, atom * 64, row, head, batch);
  }
  template <bool Values>
  SIMT_DEVICE void copy_pages(T* to, uint64_t* full, PagePlace own, int kv_head) const {
    for (int row = 0, i = 0; row < Keys; row += a.box_rows, i++) {
      const int page = shfl(own.page, i), slot = shfl(own.slot, i);
      copy<Values>(to + row * 64, full, slot, kv_head, page);
    }
  }
};

// Four warps with a quarter of the rows each, whatever pages they stand in. A copy is announced when the next has been
// started, so that two are in flight; nothing that makes room for a copy waits for the copy before it.
template <class T, int D, int Keys>
struct GatheredKeys {
  static constexpr int kWarps = 4, kProducerRegisters = 56, kConsumerRegisters = 224;
  static constexpr bool kBoxed = false;
  static constexpr int kOwnRows = Keys / kWarps, kChunks = D / 8, kRowsPerCopy = kWarp / kChunks;
  static_assert(kOwnRows <= kWarp && kOwnRows % 8 == 0 && 8 % kRowsPerCopy == 0, "a lane looks up one row");
  static constexpr uint32_t kNowhere = 0xffffffffu;
  using Stages = Ring<kForwardStages, kWarps>;

  const ForwardSm90Args& a;
  bool leader;
  uint64_t* copying = nullptr;  // what announces the copy in flight

  SIMT_DEVICE PagePlace look_up(const Work& w, int tile) const {
    return find_place(a, w, tile * Keys + warp_id() * kOwnRows + lane_id() % kOwnRows);
  }
  template <bool Values>
  SIMT_DEVICE void load(T* stages, uint64_t* full, uint64_t* empty, Stages& ring, const Work&, int, PagePlace place,
                        int kv_head) {
    const int first = warp_id() * kOwnRows, chunk = lane_id() % kChunks, of_copy = lane_id() / kChunks;
    const uint32_t own = row_of<Values>(place, kv_head);
    const bool column_exists = chunk * 8 < a.p.dim;
    const char* from = static_cast<const char*>(Values ? a.p.v : a.p.k) + chunk * 16;
    ring.await_empty(empty);
    T* to = stages + ring.stage() * Keys * D + chunk / 8 * (Keys * 64) + (first + of_copy) * 64;
    const int swizzled = ((chunk % 8) ^ of_copy) * 8;  // of row i of eight: one XOR with a constant away
#pragma unroll 1
    for (int eight = 0; eight < kOwnRows; eight += 8, to += 8 * 64) {
#pragma unroll
      for (int i = 0; i < 8; i += kRowsPerCopy) {
        const uint32_t row = shfl(own, eight + i + of_copy);
        cp_async16(to + i * 64 + (swizzled ^ (i * 8)), from + row * uint64_t(16), row != kNowhere && column_exists);
      }
    }
    cp_async_commit();
    announce<1>();
    copying = &full[ring.stage()];
    ring.used++;
  }
  SIMT_DEVICE void finish() { announce<0>(); }

 private:
  // Where a row begins, in 16 bytes.
  template <bool Values>
  SIMT_DEVICE uint32_t row_of(PagePlace place, int kv_head) const {
    const auto units = [](int64_t elements) { return static_cast<uint32_t>(elements / 8); };
    const Strides& s = Values ? a.p.v_strides : a.p.k_strides;
    return place.page < 0 ? kNowhere
                          : place.page * units(s.batch) + kv_head * units(s.head) + place.slot * units(s.row);
  }
  template <int Newer>
  SIMT_DEVICE void announce() {
    if (!copying) return;
    cp_async_wait<Newer>();
    fence_proxy_async();  // wgmma reads through the async proxy what these threads have written
    release(copying);
  }
};

}  // namespace tilewise::attention
