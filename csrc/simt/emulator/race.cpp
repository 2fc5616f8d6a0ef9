#include "race.h"

#include <stdlib.h>
#include <string.h>

#include <mutex>

#include "race_state.h"

namespace simt {
namespace race {

Checker checker;

namespace {

Checker& c = checker;

// Global buffers that tests announce; guarded by the mutex, as tests may register from any thread.
std::mutex regions_mutex;
std::vector<Region> regions;

// ---- order ----

bool happened_before(int tid, int other, uint32_t clock) {
  return clock <= c.clocks[tid][other];
}

bool foreign_happened_before(int tid, unsigned block, int other, uint32_t clock) {
  if (!c.foreign[tid]) return false;
  const auto known = c.foreign[tid]->find(block);
  return known != c.foreign[tid]->end() && clock <= known->second[other];
}

// Later accesses of the thread are told apart from those that others now know of.
void tick(int tid) {
  c.clocks[tid][tid]++;
}

bool written_here(const Region& r, const Cell& cell) {
  return r.is_shared || cell.write_block == c.block + 1;
}

bool write_is_ordered(const Region& r, const Cell& cell, int tid) {
  if (written_here(r, cell)) return happened_before(tid, cell.write_tid, cell.write_clock);
  return foreign_happened_before(tid, cell.write_block - 1, cell.write_tid, cell.write_clock);
}

// TMA and wgmma see an ordinary store only if its writer has fenced since, or the reader has after learning of it.
bool proxy_is_ordered(const Cell& cell, int tid) {
  if (!(cell.flags & Cell::kGeneric) || cell.write_tid >= c.threads) return true;
  return cell.write_clock <= c.own_fence[cell.write_tid] || cell.write_clock <= c.proxy_fenced[tid][cell.write_tid];
}

// ---- one byte ----

void check_against_write(const Region& r, size_t offset, const Cell& cell, int tid, Where where, bool is_write,
                         bool is_atomic) {
  const char* what = nullptr;
  if (cell.flags & Cell::kWriteInFlight) {
    what = is_write ? "write while an async copy is in flight" : "read while an async copy is in flight";
  } else if (!(cell.flags & Cell::kInitialised) || (is_atomic && cell.flags & Cell::kAtomic)) {
    return;
  } else if (write_is_ordered(r, cell, tid)) {
    return;
  } else if (written_here(r, cell)) {
    what = is_write ? "write-write race" : "read of a write that is not synchronised";
  } else {
    what = is_write ? "write-write race between blocks" : "write-read race between blocks";
  }
  report({what, tid, where}, r, offset, cell.write_tid, cell.write_where);
}

void check_read(const Region& r, size_t offset, int tid, Where where) {
  const Cell& cell = r.cells[offset];
  if (r.is_shared && !(cell.flags & (Cell::kInitialised | Cell::kWriteInFlight))) {
    report({"read of uninitialised shared memory", tid, where}, r, offset);
  }
  check_against_write(r, offset, cell, tid, where, false, false);
}

void forget_readers(Cell& cell) {
  delete cell.many_readers;
  cell.many_readers = nullptr;
  cell.reader_count = 0;
  cell.flags &= static_cast<uint8_t>(~Cell::kReadByBlocks);
}

// Readers that the new one is ordered after need no record of their own.
void note_read(const Region& r, Cell& cell, int tid, Where where) {
  if (!r.is_shared && cell.read_block != c.block + 1) {
    const bool others = cell.read_block != 0;
    forget_readers(cell);
    cell.read_block = c.block + 1;
    if (others) cell.flags |= Cell::kReadByBlocks;
  }
  cell.read_where = where;
  const uint32_t now = c.clocks[tid][tid];
  if (cell.many_readers) {
    (*cell.many_readers)[tid] = now;
    return;
  }
  int kept = 0;
  for (int i = 0; i < cell.reader_count; i++) {
    const Reader reader = cell.readers[i];
    if (reader.tid != tid && !happened_before(tid, reader.tid, reader.clock)) cell.readers[kept++] = reader;
  }
  cell.reader_count = static_cast<uint8_t>(kept);
  if (kept < Cell::kReaders) {
    cell.readers[cell.reader_count++] = {now, tid};
    return;
  }
  cell.many_readers = new Clock(c.threads + 1, 0);
  for (const Reader& reader : cell.readers) (*cell.many_readers)[reader.tid] = reader.clock;
  (*cell.many_readers)[tid] = now;
  cell.reader_count = 0;
}

// A reader of this block that the writer is not ordered after, or -1.
int unordered_reader(const Cell& cell, int tid) {
  if (cell.many_readers) {
    for (int other = 0; other < c.threads; other++) {
      if (!happened_before(tid, other, (*cell.many_readers)[other])) return other;
    }
    return -1;
  }
  for (int i = 0; i < cell.reader_count; i++) {
    if (!happened_before(tid, cell.readers[i].tid, cell.readers[i].clock)) return cell.readers[i].tid;
  }
  return -1;
}

// Readers in other blocks are not recorded one by one: the writer must have synchronised with that block, or with all.
bool foreign_readers_are_ordered(const Cell& cell, int tid) {
  const bool one = cell.read_block && cell.read_block != c.block + 1 && !(cell.flags & Cell::kReadByBlocks);
  const bool several = cell.flags & Cell::kReadByBlocks;
  if (!one && !several) return true;
  if (!c.foreign[tid]) return false;
  if (one) return c.foreign[tid]->count(cell.read_block - 1) != 0;
  return c.foreign[tid]->size() + 1 >= c.blocks_begun;
}

void check_write(const Region& r, size_t offset, int tid, Where where, bool is_atomic) {
  Cell& cell = r.cells[offset];
  check_against_write(r, offset, cell, tid, where, true, is_atomic);
  if (cell.reads_in_flight) {
    report({"write while an async operation may still read", tid, where}, r, offset, tid, cell.read_where);
  }
  if (!r.is_shared && !foreign_readers_are_ordered(cell, tid)) {
    report({"read-write race between blocks", tid, where}, r, offset, tid, cell.read_where);
  }
  const bool readers_here = r.is_shared || cell.read_block == c.block + 1;
  const int reader = readers_here ? unordered_reader(cell, tid) : -1;
  if (reader >= 0) report({"write races with an earlier read", tid, where}, r, offset, reader, cell.read_where);
  forget_readers(cell);
}

void set_write(Cell& cell, int tid, uint32_t clock, Where where, uint8_t flags) {
  cell.write_tid = tid;
  cell.write_clock = clock;
  cell.write_where = where;
  cell.write_block = c.block + 1;
  cell.read_block = 0;
  cell.flags = flags;
}

// ---- regions ----

Region* find(const void* p, size_t bytes) {
  const auto* q = static_cast<const unsigned char*>(p);
  const auto holds = [&](const Region& r) { return q >= r.base && q + bytes <= r.base + r.size; };
  if (holds(c.smem)) return &c.smem;
  for (Region& r : regions) {
    if (r.cells && holds(r)) return &r;
  }
  return nullptr;
}

// Calls f(region, offset) for every recorded byte of the range.
template <class F>
void for_each_byte(const void* p, size_t bytes, F f) {
  if (!c.active) return;
  Region* r = find(p, bytes);
  if (!r) return;
  const size_t first = static_cast<const unsigned char*>(p) - r->base;
  for (size_t offset = first; offset < first + bytes; offset++) f(*r, offset);
}

Where at_site(rt::Site at) {
  return {at.file, at.line};
}

void read_bytes(int tid, const void* p, size_t bytes, Where where) {
  for_each_byte(p, bytes, [&](Region& r, size_t offset) {
    check_read(r, offset, tid, where);
    note_read(r, r.cells[offset], tid, where);
  });
}

void write_bytes(int tid, const void* p, size_t bytes, Where where) {
  for_each_byte(p, bytes, [&](Region& r, size_t offset) {
    check_write(r, offset, tid, where, false);
    set_write(r.cells[offset], tid, c.clocks[tid][tid], where, Cell::kInitialised | Cell::kGeneric);
  });
}

Cell* allocate_cells(size_t bytes) {
  return static_cast<Cell*>(calloc(bytes, sizeof(Cell)));
}
void free_cells(Region& r) {
  for (size_t i = 0; r.cells && i < r.size; i++) forget_readers(r.cells[i]);
  free(r.cells);
  r.cells = nullptr;
}

}  // namespace

// ---- hooks ----

void hooked_access(int tid, const void* p, size_t bytes, bool is_write, const void* code) {
  const Where where{code, 0};
  if (is_write) {
    write_bytes(tid, p, bytes, where);
  } else {
    read_bytes(tid, p, bytes, where);
  }
}

void out_of_bounds(int tid, std::ptrdiff_t offset, bool is_write, const void* code) {
  const char* what = is_write ? "out-of-bounds write" : "out-of-bounds read";
  report({what, tid, {code, 0}}, c.smem, static_cast<size_t>(offset));
}

void register_region(const void* p, size_t bytes, const char* name) {
  std::lock_guard<std::mutex> lock(regions_mutex);
  regions.push_back({static_cast<const unsigned char*>(p), bytes, nullptr, name, false});
}

void unregister_all() {
  std::lock_guard<std::mutex> lock(regions_mutex);
  regions.clear();
}

// ---- launches and blocks ----

void begin_launch(int threads, size_t smem_bytes) {
  c = Checker();
  c.threads = threads;
  c.smem.size = smem_bytes;
  c.smem.cells = allocate_cells(smem_bytes);
  std::lock_guard<std::mutex> lock(regions_mutex);
  for (Region& r : regions) r.cells = allocate_cells(r.size);
}

std::string end_launch() {
  free_cells(c.smem);
  std::lock_guard<std::mutex> lock(regions_mutex);
  for (Region& r : regions) free_cells(r);
  return c.findings ? std::to_string(c.findings) + " memory errors" + c.report : "";
}

void begin_block(unsigned index, unsigned char* smem) {
  if (!c.smem.cells) return;  // not a checked launch
  c.block = index;
  c.blocks_begun++;
  c.smem.base = smem;
  memset(static_cast<void*>(c.smem.cells), 0, c.smem.size * sizeof(Cell));
  c.clocks.assign(c.threads, Clock(c.threads + 1, 0));
  for (int tid = 0; tid < c.threads; tid++) c.clocks[tid][tid] = 1;
  c.proxy_fenced.assign(c.threads, Clock(c.threads + 1, 0));
  c.own_fence.assign(c.threads, 0);
  c.foreign.assign(c.threads, nullptr);
  c.device_fenced.assign(c.threads, nullptr);
  c.observed.assign(c.threads, nullptr);
  c.bars.clear();
  c.load_token = 0;
  c.load_clocks.clear();
  c.active = true;
}

void end_block() {
  if (!c.active) return;
  c.active = false;
  for (size_t i = 0; i < c.smem.size; i++) forget_readers(c.smem.cells[i]);
  c.smem.base = nullptr;
}

// ---- accesses of emulated instructions ----

void read(int tid, const void* p, size_t bytes, rt::Site at) {
  read_bytes(tid, p, bytes, at_site(at));
}
void write(int tid, const void* p, size_t bytes, rt::Site at) {
  write_bytes(tid, p, bytes, at_site(at));
}

void begin_async_write(int tid, const void* p, size_t bytes, rt::Site at) {
  for_each_byte(p, bytes, [&](Region& r, size_t offset) {
    check_write(r, offset, tid, at_site(at), false);
    set_write(r.cells[offset], tid, UINT32_MAX, at_site(at), Cell::kWriteInFlight);
  });
}
void end_async_write(int tid, const void* p, size_t bytes, rt::Site at) {
  for_each_byte(p, bytes, [&](Region& r, size_t offset) {
    if (r.cells[offset].write_tid != tid) return;
    set_write(r.cells[offset], tid, c.clocks[tid][tid], at_site(at), Cell::kInitialised | Cell::kGeneric);
  });
}

void begin_async_read(int tid, const void* p, size_t bytes, rt::Site at) {
  for_each_byte(p, bytes, [&](Region& r, size_t offset) {
    Cell& cell = r.cells[offset];
    check_read(r, offset, tid, at_site(at));
    if (!proxy_is_ordered(cell, tid)) {
      report({"async-proxy read of a generic write without fence.proxy.async", tid, at_site(at)}, r, offset,
             cell.write_tid, cell.write_where);
    }
    cell.reads_in_flight++;
    cell.read_where = at_site(at);
  });
}
void end_async_read(int tid, const void* p, size_t bytes, rt::Site at) {
  for_each_byte(p, bytes, [&](Region& r, size_t offset) {
    Cell& cell = r.cells[offset];
    if (cell.reads_in_flight) cell.reads_in_flight--;
    note_read(r, cell, tid, at_site(at));
  });
}

uint32_t begin_bulk_load(int tid, const void* p, size_t bytes, rt::Site at) {
  if (!c.active) return 0;
  const uint32_t token = ++c.load_token;
  Clock& clock = c.load_clocks[token] = c.clocks[tid];
  clock[c.threads] = std::max(clock[c.threads], token);
  for_each_byte(p, bytes, [&](Region& r, size_t offset) {
    Cell& cell = r.cells[offset];
    if (!proxy_is_ordered(cell, tid)) {
      report({"async-proxy write over a generic write without fence.proxy.async", tid, at_site(at)}, r, offset,
             cell.write_tid, cell.write_where);
    }
    check_write(r, offset, tid, at_site(at), false);
    set_write(cell, c.threads, token, at_site(at), Cell::kWriteInFlight);
  });
  return token;
}

void end_bulk_load(uint32_t token, const uint64_t* bar, const void* p, size_t bytes) {
  if (!c.active) return;
  for_each_byte(p, bytes, [&](Region& r, size_t offset) {
    Cell& cell = r.cells[offset];
    if (cell.write_tid == c.threads && cell.write_clock == token) cell.flags = Cell::kInitialised;
  });
  join_into(c.bars[bar].current, c.load_clocks[token]);
  c.load_clocks.erase(token);
}

void atomic(int tid, const void* p, rt::Site at) {
  if (!c.active) return;
  for_each_byte(p, 4, [&](Region& r, size_t offset) {
    check_write(r, offset, tid, at_site(at), true);
    set_write(r.cells[offset], tid, c.clocks[tid][tid], at_site(at), Cell::kInitialised | Cell::kAtomic);
  });
  SharedForeign& published = c.published[p];
  c.observed[tid] = join(c.observed[tid], published);
  if (c.device_fenced[tid]) published = join(published, c.device_fenced[tid]);
}

// ---- order ----

void join(const std::vector<int>& arrivals, const std::vector<int>& waiters) {
  if (!c.active) return;
  Clock all;
  SharedForeign foreign;
  for (int tid : arrivals) {
    join_into(all, c.clocks[tid]);
    foreign = join(foreign, c.foreign[tid]);
  }
  for (int tid : waiters) {
    join_into(c.clocks[tid], all);
    c.foreign[tid] = join(c.foreign[tid], foreign);
  }
  for (int tid : arrivals) tick(tid);
}

void mbar_init(const uint64_t* bar) {
  if (c.active) c.bars[bar] = {};
}

void mbar_use(int tid, const uint64_t* bar, rt::Site at) {
  for_each_byte(bar, 1, [&](Region& r, size_t offset) { check_read(r, offset, tid, at_site(at)); });
}

void mbar_arrive(int tid, const uint64_t* bar) {
  if (!c.active) return;
  join_into(c.bars[bar].current, c.clocks[tid]);
  tick(tid);
}

void mbar_wait(int tid, const uint64_t* bar) {
  if (!c.active) return;
  const Clock& completed = c.bars[bar].completed;
  if (!completed.empty()) join_into(c.clocks[tid], completed);
}

void mbar_phase_complete(const uint64_t* bar) {
  if (!c.active) return;
  auto& clocks = c.bars[bar];
  clocks.completed = std::move(clocks.current);
  clocks.current.clear();
}

void fence_proxy_async(int tid) {
  if (!c.active) return;
  c.own_fence[tid] = c.clocks[tid][tid];
  c.proxy_fenced[tid] = c.clocks[tid];
  tick(tid);
}

// Acquires what this thread's earlier atomics have observed, and lets its later ones publish all it knows.
void fence_device(int tid) {
  if (!c.active) return;
  if (const SharedForeign seen = c.observed[tid]) {
    const auto own = seen->find(c.block);
    if (own != seen->end()) join_into(c.clocks[tid], own->second);
    c.foreign[tid] = join(c.foreign[tid], seen);
  }
  auto known = std::make_shared<Foreign>(c.foreign[tid] ? *c.foreign[tid] : Foreign());
  (*known)[c.block] = c.clocks[tid];
  c.device_fenced[tid] = known;
  tick(tid);
}

}  // namespace race
}  // namespace simt
