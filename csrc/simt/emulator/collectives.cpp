// Barriers and warp collectives: threads wait until the last one arrives, which does the work and wakes the others.
#include <algorithm>

#include "block.h"
#include "race.h"

namespace simt {
namespace rt {

// ---- block barriers ----

namespace {

void check_barrier(const NamedBarrier& b, int id, int expected, bool whole_block, Site at) {
  if (expected <= 0 || expected % kWarp) {
    fail("barrier %d: thread count %d is not a multiple of 32 (%s:%d)", id, expected, at.file, at.line);
  }
  if (whole_block && block->alive != block->threads) {
    fail("sync_block at %s:%d after %d threads exited", at.file, at.line, block->threads - block->alive);
  }
  if (!b.arrived) return;
  if (b.expected != expected) {
    fail("barrier %d: %d threads expected here (%s:%d) but %d at %s:%d", id, expected, at.file, at.line, b.expected,
         b.site.file, b.site.line);
  }
  if (whole_block && !same_site(b.site, at)) {
    fail("divergent sync_block: this thread is at %s:%d, %d others wait at %s:%d", at.file, at.line, b.arrived,
         b.site.file, b.site.line);
  }
}

void release(NamedBarrier& b) {
  std::vector<int> waiting_tids;
  for (const Fiber* f : b.waiters) waiting_tids.push_back(f->tid);
  race::join(b.arrivals, waiting_tids);
  const std::vector<Fiber*> waiters = std::move(b.waiters);
  b = NamedBarrier();
  for (Fiber* f : waiters) {
    if (f != this_fiber()) wake(f);
  }
  if (block->random_schedule()) give_way();  // the last one must not always be the first to go on
}

}  // namespace

void barrier(int id, int threads, bool wait, Site at) {
  if (id < 0 || id >= kNamedBarriers) fail("barrier id %d is not in 0..15 (%s:%d)", id, at.file, at.line);
  const bool whole_block = threads < 0;
  const int expected = whole_block ? block->threads : threads;
  NamedBarrier& b = block->barriers[id];
  check_barrier(b, id, expected, whole_block, at);
  if (!b.arrived) {
    b.expected = expected;
    b.whole_block = whole_block;
    b.site = at;
  }
  b.arrived++;
  b.arrivals.push_back(this_fiber()->tid);
  if (wait) b.waiters.push_back(this_fiber());
  if (b.arrived == b.expected) {
    release(b);
  } else if (wait) {
    wait_here(whole_block ? "sync_block" : "bar_sync", at);
  }
}

// ---- warp collectives ----

namespace {

Fiber* lane_fiber(int lane) {
  return block->fibers[this_fiber()->warp * kWarp + lane];
}

// The collective that lanes of the same mask have begun, or nullptr.
Collective* find_pending(Warp& warp, uint32_t mask, const char* name, Site at) {
  for (Collective& c : warp.pending) {
    if (!c.arrived) continue;
    if (c.mask == mask) return &c;
    if (c.mask & mask) {
      fail("%s: mask %08x at %s:%d overlaps the mask %08x of %s at %s:%d", name, mask, at.file, at.line, c.mask, c.name,
           c.site.file, c.site.line);
    }
  }
  return nullptr;
}

Collective* begin_collective(Warp& warp, uint32_t mask, CollectiveOp op, const char* name, Site at) {
  const auto free =
      std::find_if(std::begin(warp.pending), std::end(warp.pending), [](const Collective& c) { return !c.arrived; });
  if (free == std::end(warp.pending)) fail("%s: too many disjoint masks at once (%s:%d)", name, at.file, at.line);
  for (int lane = 0; lane < kWarp; lane++) {
    if ((mask >> lane & 1) && !lane_fiber(lane)->alive) {
      fail("%s at %s:%d: lane %d already exited", name, at.file, at.line, lane);
    }
  }
  free->mask = mask;
  free->op = op;
  free->name = name;
  free->site = at;
  return free;
}

void sync_warp_op(void**, uint32_t mask, Site) {
  std::vector<int> tids;
  for (int lane = 0; lane < kWarp; lane++) {
    if (mask >> lane & 1) tids.push_back(this_fiber()->warp * kWarp + lane);
  }
  race::join(tids, tids);
}

}  // namespace

void warp_collective(uint32_t mask, CollectiveOp op, void* args, const char* name, Site at) {
  Fiber* f = this_fiber();
  Warp& warp = block->warps[f->warp];
  if (!(mask >> f->lane & 1)) fail("%s: lane is not in its own mask %08x (%s:%d)", name, mask, at.file, at.line);
  Collective* c = find_pending(warp, mask, name, at);
  if (!c) {
    c = begin_collective(warp, mask, op, name, at);
  } else if (c->op != op || !same_site(c->site, at)) {
    fail("divergent warp collective: this lane is in %s at %s:%d, lanes %08x in %s at %s:%d", name, at.file, at.line,
         c->arrived, c->name, c->site.file, c->site.line);
  }
  c->args[f->lane] = args;
  c->arrived |= 1u << f->lane;
  if (c->arrived != mask) return wait_here(name, at);

  c->arrived = 0;  // the slot may be taken again as soon as a lane runs
  void* all_args[kWarp];
  std::copy(std::begin(c->args), std::end(c->args), all_args);
  op(all_args, mask, at);
  for (int lane = kWarp - 1; lane >= 0; lane--) {
    if ((mask >> lane & 1) && lane != f->lane) wake(lane_fiber(lane));
  }
}

void warp_sync(uint32_t mask, Site at) {
  warp_collective(mask, sync_warp_op, nullptr, "sync_warp", at);
}

void shuffle_source_missing(int lane, int source, uint32_t mask, Site at) {
  fail("shfl: lane %d reads lane %d, which is not in the mask %08x (%s:%d)", lane, source, mask, at.file, at.line);
}

void match_any_op(void** args, uint32_t mask, Site) {
  const auto of = [&](int lane) { return static_cast<VoteArgs<uint32_t>*>(args[lane]); };
  for (int lane = 0; lane < kWarp; lane++) {
    if (!(mask >> lane & 1)) continue;
    uint32_t same = 0;
    for (int other = 0; other < kWarp; other++) {
      if ((mask >> other & 1) && of(other)->value == of(lane)->value) same |= 1u << other;
    }
    of(lane)->result = same;
  }
}

void fence_device() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);  // blocks may run on several host threads
  race::fence_device(this_fiber()->tid);
}

}  // namespace rt
}  // namespace simt
