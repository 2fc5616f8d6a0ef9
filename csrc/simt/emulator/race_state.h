// What the race checker knows; see race.h.
#pragma once
#include <stdint.h>

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "race_hooks.h"

namespace simt {
namespace race {

using Clock = std::vector<uint32_t>;  // an entry per thread of the block, and one for bulk loads

inline void join_into(Clock& to, const Clock& from) {
  if (to.empty()) to.assign(from.size(), 0);
  for (size_t i = 0; i < from.size(); i++) to[i] = std::max(to[i], from[i]);
}

// What is known of other blocks: up to where each of their threads is ordered before us.
using Foreign = std::map<unsigned, Clock>;
using SharedForeign = std::shared_ptr<const Foreign>;

inline void join_into(Foreign& to, const Foreign& from) {
  for (const auto& [index, clock] : from) join_into(to[index], clock);
}
inline SharedForeign join(const SharedForeign& a, const SharedForeign& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  auto both = std::make_shared<Foreign>(*a);
  join_into(*both, *b);
  return both;
}

struct Reader {
  uint32_t clock;
  int tid;
};

// The history of one byte.
struct Cell {
  static constexpr int kReaders = 8;
  enum : uint8_t {
    kInitialised = 1,
    kWriteInFlight = 2,
    kAtomic = 4,
    kGeneric = 8,        // written by an ordinary store: TMA and wgmma see it only after a proxy fence
    kReadByBlocks = 16,  // more than one block has read it since the last write
  };
  Where write_where, read_where;
  uint32_t write_clock;
  int write_tid;
  unsigned write_block, read_block;  // index + 1; 0: none
  uint8_t flags, reader_count;
  uint16_t reads_in_flight;
  Reader readers[kReaders];
  Clock* many_readers;  // replaces `readers` once they are full
};

struct Region {
  const unsigned char* base;
  size_t size;
  Cell* cells;
  std::string name;
  bool is_shared;
};

struct Finding {
  const char* what;
  int tid;
  Where where;
};

// Everything the checker knows. One launch is checked at a time (scheduler.cpp).
struct Checker {
  bool active = false;  // a block is running
  int threads = 0;
  unsigned block = 0, blocks_begun = 0;
  Region smem{nullptr, 0, nullptr, "shared", true};
  std::vector<Clock> clocks;                 // per thread
  std::vector<Clock> proxy_fenced;           // per thread: what it knew at its last fence.proxy.async
  std::vector<uint32_t> own_fence;           // per thread: its own time at that fence
  std::vector<SharedForeign> foreign;        // per thread: other blocks
  std::vector<SharedForeign> device_fenced;  // per thread: what its atomics publish since its last fence_device
  std::vector<SharedForeign> observed;       // per thread: what its atomics have seen, known for sure at the next fence
  std::unordered_map<const void*, SharedForeign> published;  // by the atomics on an address
  struct BarClocks {
    Clock current, completed;
  };
  std::map<const uint64_t*, BarClocks> bars;
  uint32_t load_token = 0;
  std::map<uint32_t, Clock> load_clocks;
  std::set<std::pair<Where, Where>> reported;
  std::string report;
  int findings = 0;
};
extern Checker checker;

// Notes a finding, once per pair of places; the earlier access is optional.
void report(const Finding&, const Region&, size_t offset, int earlier_tid = -1, Where earlier = {});

}  // namespace race
}  // namespace simt
