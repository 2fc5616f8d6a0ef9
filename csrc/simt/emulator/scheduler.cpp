// Launches: blocks on host threads, and within a block one fiber per CUDA thread, each running until it must wait.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <mutex>
#include <numeric>
#include <thread>

#include "block.h"
#include "race.h"
#include "watchdog.h"

#if SIMT_ASAN
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) static_cast<void>(0)
#define ASAN_UNPOISON_MEMORY_REGION(p, n) static_cast<void>(0)
#endif

namespace simt {
namespace rt {

thread_local Thread* current = nullptr;
thread_local Block* block = nullptr;

namespace {

constexpr unsigned char kCanaryByte = 0xa5;
constexpr unsigned char kPoisonByte = 0xff;  // NaN in bf16, fp16 and fp32

struct BlockFailed {};

// ---- switching between fibers ----

void resume(Context& from, Fiber* to, bool from_is_finished = false) {
  current = to;
  to->atomics_since_switch = 0;
  heartbeat(to);
  switch_context(from, to->context, from_is_finished);
}

void back_to_scheduler(Context& from, bool from_is_finished = false) {
  current = nullptr;
  switch_context(from, block->scheduler, from_is_finished);
}

// The index of the fiber to run under a random schedule. Even seeds draw any; odd seeds mostly run one warp ahead of
// the others, as far as it gets: bugs that need a producer far ahead of its consumers would otherwise hardly show.
size_t random_ready() {
  const std::deque<Fiber*>& ready = block->ready;
  const bool any = block->config->seed % 2 == 0 || block->random.one_in(32);
  const size_t drawn = block->random.below(ready.size());
  if (any || ready[drawn]->warp == block->favoured_warp) return drawn;
  for (size_t i = 0; i < ready.size(); i++) {
    if (ready[i]->warp == block->favoured_warp) return i;
  }
  block->favoured_warp = ready[drawn]->warp;
  return drawn;
}

Fiber* take_ready() {
  std::deque<Fiber*>& ready = block->ready;
  if (block->random_schedule()) std::swap(ready[random_ready()], ready.back());
  const bool front = block->config->schedule == Schedule::kFifo;
  Fiber* next = front ? ready.front() : ready.back();
  if (front) {
    ready.pop_front();
  } else {
    ready.pop_back();
  }
  return next;
}

// The next fiber to run. When every fiber waits, pending loads arrive one by one; nullptr if there are none either.
Fiber* pick() {
  if (block->random_async() && !block->loads.empty() && block->random.one_in(4)) complete_a_random_load();
  while (block->ready.empty()) {
    if (block->loads.empty()) return nullptr;
    complete_load(block->random_async() ? block->random.below(block->loads.size()) : 0);
  }
  return take_ready();
}

void fiber_main() {
  entered_new_context();
  Fiber* f = this_fiber();
  block->launch->entry(block->launch->params, block->smem);
  finish_thread(f);
  f->alive = false;
  f->what = "exited";
  block->alive--;
  const NamedBarrier& b = block->barriers[0];
  if (b.arrived && b.whole_block) {
    fail("thread exits while %d threads wait at sync_block (%s:%d)", b.arrived, b.site.file, b.site.line);
  }
  if (Fiber* next = pick()) {
    resume(f->context, next, true);
  } else {
    back_to_scheduler(f->context, true);
  }
  abort();  // a finished fiber is never resumed
}

// ---- diagnoses ----

std::string thread_ranges(const std::vector<int>& tids) {
  std::string text;
  for (size_t i = 0; i < tids.size();) {
    size_t last = i;
    while (last + 1 < tids.size() && tids[last + 1] == tids[last] + 1) last++;
    if (!text.empty()) text += ",";
    text += std::to_string(tids[i]);
    if (last > i) text += "-" + std::to_string(tids[last]);
    i = last + 1;
  }
  return text;
}

std::string state_of(const Fiber* f) {
  if (!f->alive) return "exited";
  std::string text = f->what;
  if (f->awaited_bar) {
    text += "(" + describe_mbarrier(f->awaited_bar) + "; waits for parity " + std::to_string(f->awaited_parity) + ")";
  }
  return text + " at " + f->site.file + ":" + std::to_string(f->site.line);
}

[[noreturn]] void report_deadlock() {
  std::vector<std::pair<std::string, std::vector<int>>> groups;  // threads by what they wait for
  for (const Fiber* f : block->fibers) {
    const std::string state = state_of(f);
    auto group = std::find_if(groups.begin(), groups.end(), [&](const auto& g) { return g.first == state; });
    if (group == groups.end()) group = groups.insert(group, {state, {}});
    group->second.push_back(f->tid);
  }
  std::string text = "deadlock:";
  for (const auto& [state, tids] : groups) text += "\n    threads " + thread_ranges(tids) + ": " + state;
  fail("%s", text.c_str());
}

// ---- one block ----

void poison_shared_memory() {
  unsigned char* end = block->smem + block->smem_bytes;
  memset(block->smem, kPoisonByte, block->smem_bytes);
  memset(end, kCanaryByte, kCanaryBytes);
  ASAN_POISON_MEMORY_REGION(end, kCanaryBytes);
  ASAN_POISON_MEMORY_REGION(block->smem - kCanaryBytes, kCanaryBytes);
}

void check_canary() {
  const unsigned char* end = block->smem + block->smem_bytes;
  const auto* touched = std::find_if(end, end + kCanaryBytes, [](unsigned char c) { return c != kCanaryByte; });
  if (touched == end + kCanaryBytes) return;
  fail("shared memory overrun: byte %zu of %zu was written", static_cast<size_t>(touched - block->smem),
       block->smem_bytes);
}

void create_fibers() {
  for (int tid = 0; tid < block->threads; tid++) {
    auto* f = new Fiber;
    f->tid = tid;
    f->lane = tid % kWarp;
    f->warp = tid / kWarp;
    f->block = block->index;
    f->grid = block->launch->grid;
    f->block_dim = dim3(block->threads);
    prepare(f->context, take_stack(), tid, fiber_main);
    block->fibers.push_back(f);
    block->ready.push_back(f);
  }
  // Lifo takes from the back: let it too begin with thread 0.
  if (block->config->schedule == Schedule::kLifo) std::reverse(block->ready.begin(), block->ready.end());
}

void run_fibers() {
  while (block->alive && block->error.empty()) {
    Fiber* next = pick();
    if (!next) report_deadlock();
    resume(block->scheduler, next);
    current = nullptr;
  }
  while (block->error.empty() && !block->loads.empty()) complete_load(0);
  ASAN_UNPOISON_MEMORY_REGION(block->smem - kCanaryBytes, kCanaryBytes);
  ASAN_UNPOISON_MEMORY_REGION(block->smem + block->smem_bytes, kCanaryBytes);
  if (block->error.empty()) check_canary();
}

// Returns the diagnosis, empty if the block ran to its end.
std::string run_block(const Launch& launch, const Config& config, unsigned linear_index, unsigned char* smem) {
  const int warps = launch.threads / kWarp;
  Block b{&launch, &config,           linear_index,
          dim3(),  launch.threads,    launch.threads,
          smem,    launch.smem_bytes, Random(config.seed + linear_index * 0xd1b54a32d192ed03ull)};
  b.index = dim3(linear_index % launch.grid.x, linear_index / launch.grid.x % launch.grid.y,
                 linear_index / launch.grid.x / launch.grid.y);
  b.warps.resize(warps);
  b.groups.resize(ceil_div(warps, 4));
  for (size_t g = 0; g < b.groups.size(); g++) b.groups[g].first_thread = static_cast<int>(g) * kGroupThreads;
  adopt_host_stack(b.scheduler);
  block = &b;
  poison_shared_memory();
  race::begin_block(linear_index, smem);
  create_fibers();
  try {
    run_fibers();
  } catch (const BlockFailed&) {  // b.error says why
  }
  race::end_block();
  for (Fiber* f : b.fibers) {  // after a failure some are abandoned in the middle of the kernel
    return_stack(f->context.stack);
    delete f;
  }
  ASAN_UNPOISON_MEMORY_REGION(smem - kCanaryBytes, kCanaryBytes);
  ASAN_UNPOISON_MEMORY_REGION(smem + launch.smem_bytes, kCanaryBytes);
  block = nullptr;
  current = nullptr;
  return b.error;
}

// ---- one launch ----

const char* reject(const Launch& l) {
  if (l.grid.x == 0 || l.grid.y == 0 || l.grid.z == 0) return "launch: a grid dimension is zero";
  if (l.grid.x > 0x7fffffffu || l.grid.y > 65535 || l.grid.z > 65535) {
    return "launch: grid too large (x up to 2^31 - 1, y and z up to 65535)";
  }
  if (l.smem_bytes > kMaxSmemBytes) return "launch: more than 227 KB of shared memory";
  return nullptr;
}

std::vector<unsigned> block_order(unsigned blocks, const Config& config) {
  const unsigned first = std::min(config.first_block, blocks);
  std::vector<unsigned> order(blocks - first);
  std::iota(order.begin(), order.end(), first);
  if (config.schedule != Schedule::kRandom) return order;
  Random random(config.seed);
  for (unsigned i = blocks - first; i > 1; i--) std::swap(order[i - 1], order[random.below(i)]);
  return order;
}

// What the host threads of one launch share.
struct Progress {
  std::mutex mutex;
  std::vector<unsigned> order;
  size_t next = 0;
  std::string error;
  size_t error_position = 0;

  // The next block's position in `order`.
  bool take(size_t* position) {
    std::lock_guard<std::mutex> lock(mutex);
    if (next == order.size() || !error.empty()) return false;
    *position = next++;
    return true;
  }
  // Keeps the first failure in order, not in time: a seed must reproduce it whatever the host threads do.
  void report(size_t position, const std::string& text) {
    std::lock_guard<std::mutex> lock(mutex);
    if (!error.empty() && error_position < position) return;
    error = text;
    error_position = position;
  }
};

void run_blocks(const Launch& launch, const Config& config, Progress& progress) {
  const size_t bytes = (launch.smem_bytes + 2 * kCanaryBytes + 1023) / 1024 * 1024;
  auto* arena = static_cast<unsigned char*>(aligned_alloc(1024, bytes));
  const HeartbeatScope watched(config.watchdog_s);
  size_t position = 0;
  while (progress.take(&position)) {
    const std::string error = run_block(launch, config, progress.order[position], arena + kCanaryBytes);
    if (!error.empty()) progress.report(position, error);
  }
  free(arena);
}

std::string run_parallel(const Launch& launch, const Config& config, Progress& progress) {
  const size_t workers = std::min<size_t>(config.threads, progress.order.size());
  std::vector<std::thread> others;
  for (size_t i = 1; i < workers; i++) {
    others.emplace_back([&] { run_blocks(launch, config, progress); });
  }
  run_blocks(launch, config, progress);
  for (std::thread& t : others) t.join();
  return progress.error;
}

// The checker's records are global, so checked launches run one at a time and block by block.
std::string run_checked(const Launch& launch, const Config& config, Progress& progress) {
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  race::begin_launch(launch.threads, launch.smem_bytes);
  run_blocks(launch, config, progress);
  const std::string races = race::end_launch();
  if (progress.error.empty() || races.empty()) return progress.error + races;
  return progress.error + "\n" + races;
}

}  // namespace

void fail(const char* format, ...) {
  char text[8192];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  if (block->error.empty()) {
    const dim3 index = block->index;
    char head[160];
    if (current) {
      snprintf(head, sizeof head, "block (%u,%u,%u) thread %d (warp %d lane %d): ", index.x, index.y, index.z,
               current->tid, current->warp, current->lane);
    } else {
      snprintf(head, sizeof head, "block (%u,%u,%u): ", index.x, index.y, index.z);
    }
    block->error = std::string(head) + text;
  }
  if (!current) throw BlockFailed{};
  back_to_scheduler(this_fiber()->context);  // the scheduler abandons the block
  abort();
}

void misaligned(const char* what, const void* p, int bytes, Site at) {
  fail("%s: misaligned address %p, not a multiple of %d (%s:%d)", what, p, bytes, at.file, at.line);
}

void wait_here(const char* what, Site at) {
  Fiber* f = this_fiber();
  f->what = what;
  f->site = at;
  Fiber* next = pick();
  if (next == f) {  // a load that arrived in pick() has just woken it
  } else if (next) {
    resume(f->context, next);
  } else {
    back_to_scheduler(f->context);
  }
  current = f;
}

void wake(Fiber* f) {
  f->what = "running";
  block->ready.push_back(f);
}

void give_way() {
  Fiber* f = this_fiber();
  std::deque<Fiber*>& ready = block->ready;
  if (!f || ready.empty()) return;
  std::swap(ready[block->random.below(ready.size())], ready.front());
  Fiber* next = ready.front();
  ready.pop_front();
  ready.push_back(f);
  resume(f->context, next);
  current = f;
}

const char* run(const Launch& launch) {
  static thread_local std::string error;
  if (const char* why = reject(launch)) return why;
  const Config config = Config::from_environment();
  Progress progress;
  progress.order = block_order(launch.grid.x * launch.grid.y * launch.grid.z, config);
  const bool checked = race::enabled() && config.race;
  error = checked ? run_checked(launch, config, progress) : run_parallel(launch, config, progress);
  return error.empty() ? nullptr : error.c_str();
}

Config Config::from_environment() {
  const auto number = [](const char* name, long otherwise) {
    const char* value = getenv(name);
    return value ? atol(value) : otherwise;
  };
  const auto is = [](const char* name, const char* expected) {
    const char* value = getenv(name);
    return value && !strcmp(value, expected);
  };
  Config c;
  if (is("SIMT_SCHED", "fifo")) c.schedule = Schedule::kFifo;
  if (is("SIMT_SCHED", "random")) c.schedule = Schedule::kRandom;
  if (is("SIMT_ASYNC", "eager")) c.async = AsyncOrder::kEager;
  if (is("SIMT_ASYNC", "random")) c.async = AsyncOrder::kRandom;
  c.seed = static_cast<uint64_t>(number("SIMT_SEED", 0));
  c.preempt = static_cast<unsigned>(number("SIMT_PREEMPT", 0));
  c.threads = static_cast<unsigned>(std::max(1l, number("SIMT_THREADS", std::thread::hardware_concurrency())));
  c.watchdog_s = static_cast<unsigned>(number("SIMT_WATCHDOG", c.watchdog_s));
  c.first_block = static_cast<unsigned>(std::max(0l, number("SIMT_FIRST_BLOCK", 0)));
  c.race = number("SIMT_RACE", 1) != 0;
  return c;
}

}  // namespace rt
}  // namespace simt
