// The environment variables that steer a launch; read at each launch.
#pragma once
#include <stdint.h>

namespace simt {
namespace rt {

// Which ready fiber runs next (SIMT_SCHED) and when asynchronous operations take effect (SIMT_ASYNC).
enum class Schedule { kFifo, kLifo, kRandom };
enum class AsyncOrder { kLazy, kEager, kRandom };

struct Config {
  Schedule schedule = Schedule::kLifo;
  AsyncOrder async = AsyncOrder::kLazy;
  uint64_t seed = 0;          // SIMT_SEED
  unsigned preempt = 0;       // SIMT_PREEMPT: one in this many shared-memory accesses gives way (race build)
  unsigned threads = 1;       // SIMT_THREADS: blocks run at the same time (not in the race build)
  unsigned watchdog_s = 120;  // SIMT_WATCHDOG: seconds without a fiber switch before the process is stopped; 0: never
  unsigned first_block = 0;   // SIMT_FIRST_BLOCK: blocks before it are left out, to reach the end of a huge grid
  bool race = true;           // SIMT_RACE: check for races, if the kernels are instrumented

  static Config from_environment();
};

// A small generator: schedules must be reproducible from the seed, on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_((seed + 1) * 0x9e3779b97f4a7c15ull) {
    next();
    next();
  }
  uint32_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<uint32_t>(state_ >> 32);
  }
  uint32_t below(uint32_t n) { return next() % n; }
  bool one_in(uint32_t n) { return next() % n == 0; }

 private:
  uint64_t state_;
};

}  // namespace rt
}  // namespace simt
