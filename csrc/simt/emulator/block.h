// The state of one running block, and what the scheduler offers to the instructions.
#pragma once
#include <string.h>

#include <deque>
#include <map>
#include <string>
#include <vector>

#include "../simt.h"
#include "config.h"
#include "fiber.h"

namespace simt {
namespace rt {

constexpr size_t kCanaryBytes = 1024;         // guarded bytes on both sides of shared memory
constexpr uint32_t kSmemBase = 1024;          // shared address of the first byte: 0 stays invalid
constexpr size_t kMaxSmemBytes = 227 * 1024;  // the most a block can have on sm_90
constexpr int kNamedBarriers = 16;
constexpr int kGroupThreads = 128;  // a warpgroup

// A copy between shared and global memory, by cp.async.bulk (map == nullptr) or through a tensor map.
struct BulkCopy {
  const TensorMap* map;
  Coord at;
  unsigned char* shared;
  unsigned char* global;
  size_t bytes;
  Site site;
};
struct PendingLoad {
  BulkCopy copy;
  uint64_t* bar;
  uint32_t race_token;
};
struct PendingStore {
  BulkCopy copy;
  int group;
  bool done;
};
struct PendingCpAsync {
  unsigned char* dst;
  const unsigned char* src;
  int bytes, group;
  bool predicate, done;
  Site site;
};

struct Fiber : Thread {
  Context context;
  bool alive = true;
  const char* what = "running";  // the instruction it waits in
  Site site{"", 0};
  uint64_t* awaited_bar = nullptr;
  uint32_t awaited_parity = 0;
  std::vector<PendingCpAsync> copies;
  int copy_groups = 0;
  std::vector<PendingStore> stores;
  int store_groups = 0;
  unsigned atomics_since_switch = 0;
};

struct NamedBarrier {
  int arrived = 0, expected = 0;
  bool whole_block = false;
  Site site{"", 0};
  std::vector<Fiber*> waiters;
  std::vector<int> arrivals;
};

// A warp collective in progress; disjoint masks may run concurrently.
struct Collective {
  uint32_t mask = 0, arrived = 0;
  CollectiveOp op = nullptr;
  const char* name = "";
  Site site{"", 0};
  void* args[kWarp];
};
struct Warp {
  Collective pending[4];
};

struct WgmmaOp {
  WgmmaShape shape;
  uint64_t desc_a, desc_b;
  bool accumulate, executed = false;
  int group;
  Site site;
  float* d[kGroupThreads];
  const uint32_t* a[kGroupThreads];
  uint32_t a_at_issue[kGroupThreads][4];
  std::vector<float> saved;  // the accumulators behind the poison
};
struct WarpGroup;
using GroupOp = void (*)(WarpGroup&, Site);
struct WarpGroup {
  int first_thread = 0, arrived = 0;
  GroupOp op = nullptr;
  const char* name = "";
  Site site{"", 0};
  void* args[kGroupThreads];
  std::vector<WgmmaOp> ops;
  int commit_groups = 0;
  bool fenced = false;
  int registers = 0;  // set by setmaxnreg
};

struct Block {
  const Launch* launch;
  const Config* config;
  unsigned linear_index;
  dim3 index;
  int threads, alive;
  unsigned char* smem;
  size_t smem_bytes;
  Random random;
  int favoured_warp = -1;  // see random_ready()
  std::string error;
  Context scheduler;
  std::vector<Fiber*> fibers;
  std::deque<Fiber*> ready;
  NamedBarrier barriers[kNamedBarriers];
  std::vector<Warp> warps;
  std::vector<WarpGroup> groups;
  std::map<const uint64_t*, bool> mbarriers;  // those that were initialised
  std::vector<PendingLoad> loads;             // issued, not yet arrived

  bool random_schedule() const { return config->schedule == Schedule::kRandom; }
  bool random_async() const { return config->async == AsyncOrder::kRandom; }
};

extern thread_local Block* block;
inline Fiber* this_fiber() {
  return static_cast<Fiber*>(current);
}

// Ends the block with a diagnosis; never returns to the kernel.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void wait_here(const char* what, Site);  // until wake()
void wake(Fiber*);
void give_way();                // to a random ready fiber, if there is one
void complete_a_random_load();  // if any is in flight

inline bool same_site(Site a, Site b) {
  return a.line == b.line && !strcmp(a.file, b.file);
}

// ---- shared memory ----
bool in_smem(const void* p, size_t bytes);
void check_smem(const void* p, size_t bytes, size_t alignment, const char* what, Site);
unsigned char* from_smem_addr(uint32_t address, size_t bytes, const char* what, Site);
// TMA and wgmma exchange the 16-byte chunks of a 128-byte row by the row's index modulo 8.
inline uint32_t swizzle128(uint32_t address) {
  return address ^ (address >> 7 & 7) << 4;
}

// ---- mbarriers and pending operations ----
std::string describe_mbarrier(const uint64_t*);
void complete_load(size_t index);
void finish_thread(Fiber*);  // a thread's own copies, when it returns from the kernel

}  // namespace rt
}  // namespace simt
