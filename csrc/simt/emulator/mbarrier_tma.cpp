// mbarriers and the copies that complete on them: cp.async.bulk and TMA.
#include "block.h"
#include "race.h"

namespace simt {
namespace rt {

// ---- mbarrier: the 64-bit word in shared memory holds the whole state ----

namespace {

constexpr int kTxBias = 1 << 22;  // the transaction count may be negative: bytes can arrive before they are expected

struct Mbarrier {
  int pending, expected;  // arrivals: still missing, and per phase
  int tx_bytes;
  unsigned phase;
};

Mbarrier unpack(uint64_t word) {
  Mbarrier m;
  m.pending = static_cast<int>(word & 0xfffff);
  m.expected = static_cast<int>(word >> 20 & 0xfffff);
  m.tx_bytes = static_cast<int>(word >> 40 & 0x7fffff) - kTxBias;
  m.phase = static_cast<unsigned>(word >> 63);
  return m;
}

uint64_t pack(const Mbarrier& m) {
  return static_cast<uint64_t>(m.pending) | static_cast<uint64_t>(m.expected) << 20 |
         (static_cast<uint64_t>(m.tx_bytes + kTxBias) & 0x7fffff) << 40 | static_cast<uint64_t>(m.phase) << 63;
}

void check_initialised(const uint64_t* bar, const char* what, Site at) {
  if (!block->mbarriers.count(bar)) {
    fail("%s on an mbarrier that was never initialised (%s:%d)", what, at.file, at.line);
  }
  if (current) race::mbar_use(current->tid, bar, at);
}

void wake_waiters(const uint64_t* bar, unsigned phase) {
  for (Fiber* f : block->fibers) {
    if (!f->alive || f->awaited_bar != bar || f->awaited_parity == phase) continue;
    f->awaited_bar = nullptr;
    wake(f);
  }
}

// Stores the new state; a phase is complete when no arrivals and no bytes are missing.
void update(uint64_t* bar, Mbarrier m) {
  const bool complete = m.pending == 0 && m.tx_bytes == 0;
  if (complete) {
    m.phase ^= 1;
    m.pending = m.expected;
  }
  *bar = pack(m);
  if (!complete) return;
  race::mbar_phase_complete(bar);
  wake_waiters(bar, m.phase);
}

}  // namespace

std::string describe_mbarrier(const uint64_t* bar) {
  const Mbarrier m = unpack(*bar);
  const auto offset = reinterpret_cast<const unsigned char*>(bar) - block->smem;
  return "mbarrier at smem+" + std::to_string(offset) + ": phase " + std::to_string(m.phase) + ", " +
         std::to_string(m.pending) + " of " + std::to_string(m.expected) + " arrivals pending, tx-count " +
         std::to_string(m.tx_bytes);
}

void mbar_init(uint64_t* bar, uint32_t count, Site at) {
  check_smem(bar, 8, 8, "mbar_init", at);
  if (count == 0 || count >= 1u << 20)
    fail("mbar_init: count %u is not in 1..2^20 - 1 (%s:%d)", count, at.file, at.line);
  block->mbarriers[bar] = true;
  *bar = pack({static_cast<int>(count), static_cast<int>(count), 0, 0});
  race::mbar_init(bar);
  race::write(current->tid, bar, 8, at);
}

void mbar_arrive(uint64_t* bar, int64_t tx_bytes, Site at) {
  check_initialised(bar, "mbar_arrive", at);
  Mbarrier m = unpack(*bar);
  if (m.pending == 0) {
    fail("mbar_arrive: more arrivals than the mbarrier expects (%s) at %s:%d", describe_mbarrier(bar).c_str(), at.file,
         at.line);
  }
  race::mbar_arrive(current->tid, bar);
  m.tx_bytes += static_cast<int>(tx_bytes);
  m.pending--;
  update(bar, m);
  // The code behind an arrive must not rely on running before those it wakes.
  if (block->random_schedule() && block->random.one_in(2)) give_way();
  if (block->random_async() && block->random.one_in(2)) complete_a_random_load();
}

void mbar_wait(uint64_t* bar, uint32_t parity, Site at) {
  check_initialised(bar, "mbar_wait", at);
  Fiber* f = this_fiber();
  if (unpack(*bar).phase == parity) {
    f->awaited_bar = bar;
    f->awaited_parity = parity;
    wait_here("mbar_wait", at);
  }
  race::mbar_wait(f->tid, bar);
}

void fence_proxy_async() {
  race::fence_proxy_async(this_fiber()->tid);
}

// ---- boxes ----

namespace {

size_t box_bytes(const TensorMap& map) {
  size_t bytes = map.elem_bytes;
  for (int i = 0; i < map.rank; i++) bytes *= map.box[i];
  return bytes;
}

// The global address of a box row, nullptr if it lies outside the tensor. Rows count through dimensions 1 and up.
unsigned char* row_address(const TensorMap& map, const Coord& at, size_t row) {
  auto* p = const_cast<unsigned char*>(map.base);
  for (int i = 1; i < map.rank; i++) {
    const int64_t x = at.c[i] + static_cast<int64_t>(row % map.box[i]);
    row /= map.box[i];
    if (x < 0 || x >= static_cast<int64_t>(map.dim[i])) return nullptr;
    p += static_cast<size_t>(x) * map.stride[i];
  }
  return p;
}

// Calls f(shared, global or nullptr if outside, bytes) for a row of a box: whole 16-byte chunks where they lie inside
// the tensor, element by element elsewhere.
template <class F>
void visit_row(const TensorMap& map, int first, unsigned char* global_row, uint32_t smem_row, F f) {
  const uint32_t row_bytes = map.box[0] * map.elem_bytes;
  const int64_t length = static_cast<int64_t>(map.dim[0]);
  for (uint32_t byte = 0; byte < row_bytes; byte += 16) {
    unsigned char* shared = block->smem + (swizzle128(smem_row + byte) - kSmemBase);
    int64_t x = first + static_cast<int64_t>(byte / map.elem_bytes);
    if (global_row && x >= 0 && x + 16 / map.elem_bytes <= length && byte + 16 <= row_bytes) {
      f(shared, global_row + x * map.elem_bytes, 16);
      continue;
    }
    for (uint32_t i = 0; i < 16 && byte + i < row_bytes; i += map.elem_bytes, x++) {
      const bool inside = global_row && x >= 0 && x < length;
      f(shared + i, inside ? global_row + x * map.elem_bytes : nullptr, map.elem_bytes);
    }
  }
}

// In shared memory a box lies packed, innermost dimension first, and swizzled.
template <class F>
void visit(const BulkCopy& copy, F f) {
  if (!copy.map) return f(copy.shared, copy.global, copy.bytes);
  const TensorMap& map = *copy.map;
  const uint32_t row_bytes = map.box[0] * map.elem_bytes;
  const uint32_t start = kSmemBase + static_cast<uint32_t>(copy.shared - block->smem);
  for (size_t row = 0; row < copy.bytes / row_bytes; row++) {
    visit_row(map, copy.at.c[0], row_address(map, copy.at, row), start + static_cast<uint32_t>(row) * row_bytes, f);
  }
}

BulkCopy make_box(const char* what, const TensorMap* map, const void* shared, int rank, Coord coord, Site at) {
  if (map->magic != kTensorMapMagic) fail("%s: not a tensor map (%s:%d)", what, at.file, at.line);
  if (map->rank != rank) {
    fail("%s: %d coordinates for a tensor map of rank %d (%s:%d)", what, rank, map->rank, at.file, at.line);
  }
  const bool full_rows = map->box[0] * map->elem_bytes == 128;
  const size_t bytes = box_bytes(*map);
  if (full_rows && smem_addr(shared, at) % 1024) {
    fail("%s: 128-byte-swizzled tile not 1024-byte aligned (%s:%d)", what, at.file, at.line);
  }
  check_smem(shared, bytes, 16, what, at);
  auto* tile = static_cast<unsigned char*>(const_cast<void*>(shared));
  return {map, coord, tile, nullptr, bytes, at};
}

BulkCopy make_bulk(const char* what, const void* shared, const void* global, uint32_t bytes, Site at) {
  check_smem(shared, bytes, 16, what, at);
  if (bytes % 16 || bytes == 0) fail("%s: %u bytes is not a multiple of 16 (%s:%d)", what, bytes, at.file, at.line);
  if (reinterpret_cast<uintptr_t>(global) % 16) misaligned(what, global, 16, at);
  auto* tile = static_cast<unsigned char*>(const_cast<void*>(shared));
  auto* source = static_cast<unsigned char*>(const_cast<void*>(global));
  return {nullptr, Coord{}, tile, source, bytes, at};
}

// ---- loads: the whole block waits for them through an mbarrier ----

void arrive(const PendingLoad& load) {
  visit(load.copy, [](unsigned char* shared, const unsigned char* global, size_t bytes) {
    if (global) {
      memcpy(shared, global, bytes);
    } else {
      memset(shared, 0, bytes);  // counts as delivered all the same
    }
  });
  race::end_bulk_load(load.race_token, load.bar, load.copy.shared, load.copy.bytes);
  Mbarrier m = unpack(*load.bar);
  m.tx_bytes -= static_cast<int>(load.copy.bytes);
  update(load.bar, m);
}

void issue_load(const char* what, const BulkCopy& copy, uint64_t* bar) {
  check_initialised(bar, what, copy.site);
  const int tid = this_fiber()->tid;
  visit(copy, [&](unsigned char*, const unsigned char* global, size_t bytes) {
    if (global) race::read(tid, global, bytes, copy.site);
  });
  const PendingLoad load{copy, bar, race::begin_bulk_load(tid, copy.shared, copy.bytes, copy.site)};
  if (block->config->async == AsyncOrder::kEager) {
    arrive(load);
  } else {
    block->loads.push_back(load);
  }
}

// ---- stores: the issuing thread waits for them, in groups ----

void execute(PendingStore& store) {
  if (store.done) return;
  store.done = true;
  const int tid = this_fiber()->tid;
  visit(store.copy, [&](unsigned char* shared, unsigned char* global, size_t bytes) {
    if (!global) return;
    race::write(tid, global, bytes, store.copy.site);
    memcpy(global, shared, bytes);
  });
}

void issue_store(const BulkCopy& copy) {
  Fiber* f = this_fiber();
  race::begin_async_read(f->tid, copy.shared, copy.bytes, copy.site);
  PendingStore store{copy, f->store_groups, false};
  const bool now = block->config->async == AsyncOrder::kEager || (block->random_async() && block->random.one_in(2));
  if (now) execute(store);
  f->stores.push_back(store);
}

}  // namespace

void complete_load(size_t index) {
  const PendingLoad load = block->loads[index];
  block->loads.erase(block->loads.begin() + static_cast<std::ptrdiff_t>(index));
  arrive(load);
}

void complete_a_random_load() {
  if (!block->loads.empty()) complete_load(block->random.below(block->loads.size()));
}

void tma_load(void* dst, const TensorMap* map, uint64_t* bar, int rank, Coord coord, Site at) {
  issue_load("tma_load", make_box("tma_load", map, dst, rank, coord, at), bar);
}
void bulk_load(void* dst, const void* src, uint32_t bytes, uint64_t* bar, Site at) {
  issue_load("bulk_load", make_bulk("bulk_load", dst, src, bytes, at), bar);
}
void tma_store(const TensorMap* map, const void* src, int rank, Coord coord, Site at) {
  issue_store(make_box("tma_store", map, src, rank, coord, at));
}
void bulk_store(void* dst, const void* src, uint32_t bytes, Site at) {
  issue_store(make_bulk("bulk_store", src, dst, bytes, at));
}

void bulk_commit() {
  this_fiber()->store_groups++;
}

void bulk_wait_read(int newest_pending) {
  Fiber* f = this_fiber();
  const int complete = f->store_groups - newest_pending;
  size_t kept = 0;
  for (PendingStore& s : f->stores) {
    if (s.group >= complete) {
      f->stores[kept++] = s;
      continue;
    }
    execute(s);
    race::end_async_read(f->tid, s.copy.shared, s.copy.bytes, s.copy.site);
  }
  f->stores.resize(kept);
}

}  // namespace rt

const char* make_tensor_map_sw128(TensorMap* map, const void* base, int elem_bytes, int rank, const uint64_t* dims,
                                  const uint64_t* strides, const uint32_t* box) {
  if (rank < 2 || rank > 5) return "tensor map: rank not in 2..5";
  if (elem_bytes != 1 && elem_bytes != 2 && elem_bytes != 4) return "tensor map: elements of 1, 2 or 4 bytes";
  if (reinterpret_cast<uintptr_t>(base) % 16) return "tensor map: base not 16-byte aligned";
  if (box[0] * elem_bytes > 128) return "tensor map: inner box over 128 bytes with 128-byte swizzle";
  if (box[0] * elem_bytes % 16) return "tensor map: inner box not a multiple of 16 bytes";
  *map = TensorMap{};
  map->base = static_cast<const unsigned char*>(base);
  map->rank = rank;
  map->elem_bytes = elem_bytes;
  map->magic = rt::kTensorMapMagic;
  map->stride[0] = static_cast<uint64_t>(elem_bytes);
  for (int i = 0; i < rank; i++) {
    if (!box[i] || box[i] > 256) return "tensor map: box dimension not in 1..256";
    if (!dims[i] || dims[i] > uint64_t{1} << 32) return "tensor map: dimension not in 1..2^32";
    map->dim[i] = dims[i];
    map->box[i] = box[i];
    if (i == 0) continue;
    if (strides[i - 1] % 16 || strides[i - 1] >= uint64_t{1} << 40) {
      return "tensor map: stride not a multiple of 16 bytes or over 2^40";
    }
    map->stride[i] = strides[i - 1];
  }
  return nullptr;
}

}  // namespace simt
