#include "watchdog.h"

#include <stdio.h>
#include <stdlib.h>

#include <atomic>
#include <chrono>
#include <list>
#include <mutex>
#include <thread>

namespace simt {
namespace rt {

namespace {

struct Pulse {
  std::atomic<uint64_t> beats{0};
  std::atomic<const Thread*> running{nullptr};
  unsigned limit_s = 0;
  // the watchdog's own
  uint64_t seen = 0;
  unsigned silent_s = 0;
};

struct Registry {
  std::mutex mutex;
  std::list<Pulse> pulses;
};
Registry& registry() {
  static auto* r = new Registry;  // never destroyed: the watchdog outlives static destructors
  return *r;
}

thread_local Pulse* pulse = nullptr;

[[noreturn]] void stop(const Pulse& p) {
  const Thread* t = p.running;
  fprintf(stderr,
          "simt watchdog: block (%u,%u,%u) thread %d has run for %u s without reaching a barrier or collective. "
          "A spin loop? Threads of the emulator are cooperative (SIMT_WATCHDOG sets the limit).\n",
          t->block.x, t->block.y, t->block.z, t->tid, p.silent_s);
  abort();
}

void check(Pulse& p) {
  const uint64_t beats = p.beats.load(std::memory_order_relaxed);
  p.silent_s = beats == p.seen ? p.silent_s + 1 : 0;
  p.seen = beats;
  if (p.limit_s && p.silent_s >= p.limit_s && p.running.load()) stop(p);
}

void watch() {
  for (;;) {
    std::this_thread::sleep_for(std::chrono::seconds(1));
    Registry& r = registry();
    std::lock_guard<std::mutex> lock(r.mutex);
    for (Pulse& p : r.pulses) check(p);
  }
}

}  // namespace

HeartbeatScope::HeartbeatScope(unsigned limit_s) {
  if (!limit_s) return;
  static std::once_flag started;
  std::call_once(started, [] { std::thread(watch).detach(); });
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  r.pulses.emplace_back();
  pulse = &r.pulses.back();
  pulse->limit_s = limit_s;
}

HeartbeatScope::~HeartbeatScope() {
  if (!pulse) return;
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  r.pulses.remove_if([](const Pulse& p) { return &p == pulse; });
  pulse = nullptr;
}

void heartbeat(const Thread* running) {
  if (!pulse) return;
  pulse->running.store(running, std::memory_order_relaxed);
  pulse->beats.store(pulse->beats.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
}

}  // namespace rt
}  // namespace simt
