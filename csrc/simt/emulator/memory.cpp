// Shared-memory addresses, atomics, cp.async.
#include "block.h"
#include "race.h"

#if SIMT_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace simt {
namespace rt {

// ---- shared memory ----

bool in_smem(const void* p, size_t bytes) {
  const auto* q = static_cast<const unsigned char*>(p);
  return q >= block->smem && q + bytes <= block->smem + block->smem_bytes;
}

void check_smem(const void* p, size_t bytes, size_t alignment, const char* what, Site at) {
  if (reinterpret_cast<uintptr_t>(p) % alignment) {
    fail("%s: shared address not %zu-byte aligned (%s:%d)", what, alignment, at.file, at.line);
  }
  if (in_smem(p, bytes)) return;
  const auto offset = static_cast<const unsigned char*>(p) - block->smem;
  fail("%s: shared address out of bounds, offset %td of %zu (%s:%d)", what, offset, block->smem_bytes, at.file,
       at.line);
}

uint32_t smem_addr(const void* p, Site at) {
  if (!in_smem(p, 1)) fail("address %p is not in shared memory (%s:%d)", p, at.file, at.line);
  return kSmemBase + static_cast<uint32_t>(static_cast<const unsigned char*>(p) - block->smem);
}

unsigned char* from_smem_addr(uint32_t address, size_t bytes, const char* what, Site at) {
  if (address < kSmemBase || address + bytes > kSmemBase + block->smem_bytes) {
    fail("%s: reads shared memory at offset %lld, outside [0, %zu) (%s:%d)", what,
         static_cast<long long>(address) - kSmemBase, block->smem_bytes, at.file, at.line);
  }
  return block->smem + (address - kSmemBase);
}

// ---- atomics ----

namespace {

constexpr unsigned kSpinLimit = 1u << 22;

uint32_t combine(Atomic op, uint32_t old, uint32_t v, uint32_t expected) {
  const auto s = [](uint32_t bits) { return static_cast<int32_t>(bits); };
  switch (op) {
    case Atomic::kAddF32: return f32_bits(bits_f32(old) + bits_f32(v));
    case Atomic::kAdd: return old + v;
    case Atomic::kMaxS32: return s(old) > s(v) ? old : v;
    case Atomic::kMaxU32: return old > v ? old : v;
    case Atomic::kMinS32: return s(old) < s(v) ? old : v;
    case Atomic::kMinU32: return old < v ? old : v;
    case Atomic::kOr: return old | v;
    case Atomic::kAnd: return old & v;
    case Atomic::kExch: return v;
    case Atomic::kCas: return old == expected ? v : old;
  }
  return old;
}

}  // namespace

uint32_t atomic32(void* p, Atomic op, uint32_t operand, uint32_t expected, Site at) {
  Fiber* f = this_fiber();
  if (reinterpret_cast<uintptr_t>(p) % 4) misaligned("atomic", p, 4, at);
  if (++f->atomics_since_switch > kSpinLimit) {
    fail("spin loop: %u atomics without reaching a barrier (%s:%d); threads of the emulator are cooperative",
         f->atomics_since_switch, at.file, at.line);
  }
  race::atomic(f->tid, p, at);
  auto* word = static_cast<uint32_t*>(p);
  uint32_t old = __atomic_load_n(word, __ATOMIC_RELAXED);
  uint32_t desired;
  do {
    desired = combine(op, old, operand, expected);
  } while (!__atomic_compare_exchange_n(word, &old, desired, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  if (block->random_schedule() && block->random.one_in(4)) give_way();
  return old;
}

// ---- cp.async: takes effect between its issue and the wait for its group ----

namespace {

void execute(PendingCpAsync& c) {
  if (c.done) return;
  c.done = true;
  if (c.predicate) {
    memcpy(c.dst, c.src, c.bytes);
  } else {
    memset(c.dst, 0, c.bytes);
  }
}

// The copy itself may run much later, in another thread's name: let the sanitizer report the issuing line.
void touch_source(const void* src, int bytes) {
#if SIMT_ASAN
  if (void* bad = __asan_region_is_poisoned(const_cast<void*>(src), bytes)) {
    static_cast<void>(*static_cast<volatile char*>(bad));
  }
#else
  (void)src;
  (void)bytes;
#endif
}

bool takes_effect_now() {
  if (block->config->async == AsyncOrder::kEager) return true;
  return block->random_async() && block->random.one_in(2);
}

}  // namespace

void cp_async(void* dst, const void* src, int bytes, bool predicate, Site at) {
  Fiber* f = this_fiber();
  check_smem(dst, bytes, bytes, "cp.async", at);
  if (reinterpret_cast<uintptr_t>(src) % bytes) {
    fail("cp.async: global address not %d-byte aligned (%s:%d)", bytes, at.file, at.line);
  }
  if (predicate) {
    touch_source(src, bytes);
    race::read(f->tid, src, bytes, at);
  }
  race::begin_async_write(f->tid, dst, bytes, at);
  PendingCpAsync c{static_cast<unsigned char*>(dst),
                   static_cast<const unsigned char*>(src),
                   bytes,
                   f->copy_groups,
                   predicate,
                   false,
                   at};
  if (takes_effect_now()) execute(c);
  f->copies.push_back(c);
}

void cp_async_commit() {
  this_fiber()->copy_groups++;
}

void cp_async_wait(int newest_pending) {
  Fiber* f = this_fiber();
  const int complete = f->copy_groups - newest_pending;
  size_t kept = 0;
  for (PendingCpAsync& c : f->copies) {
    if (c.group >= complete) {
      f->copies[kept++] = c;
      continue;
    }
    execute(c);
    race::end_async_write(f->tid, c.dst, c.bytes, c.site);
  }
  f->copies.resize(kept);
}

void finish_thread(Fiber* f) {
  cp_async_commit();
  cp_async_wait(0);
  const WarpGroup& g = block->groups[f->tid / kGroupThreads];
  if (!g.ops.empty()) {
    const Site at = g.ops.front().site;
    fail("thread exits without waiting for the wgmma issued at %s:%d", at.file, at.line);
  }
  if (f->stores.empty()) return;
  const Site at = f->stores.front().copy.site;
  fail("thread exits while a bulk store issued at %s:%d may still read shared memory", at.file, at.line);
}

}  // namespace rt
}  // namespace simt
