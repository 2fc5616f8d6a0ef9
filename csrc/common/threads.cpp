#include "common/threads.h"

#include <dlfcn.h>
#include <sched.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "common/pool.h"
#include "common/torch_library.h"
#include "tilewise/runtime.h"

namespace tilewise {
namespace {

// torch >= 2.10 exports these with C linkage (its stable shim). Calling them keeps one thread team in the process: a
// second OpenMP runtime makes alternating small kernels 5 to 30 times slower.
using TorchParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context);
using TorchNumThreads = int32_t (*)(uint32_t* count);
std::atomic<TorchParallelFor> torch_parallel_for{nullptr};
std::atomic<TorchNumThreads> torch_num_threads{nullptr};

enum class Backend { automatic, serial, pool, torch };

Backend requested_backend() {
  const char* name = std::getenv("TILEWISE_THREADS");
  if (!name) return Backend::automatic;
  if (!std::strcmp(name, "serial")) return Backend::serial;
  if (!std::strcmp(name, "pool")) return Backend::pool;
  return Backend::automatic;
}

Backend backend() {
  static const Backend requested = requested_backend();
  if (requested != Backend::automatic) return requested;
  // After fork() torch's team is gone, and calling it would hang.
  const bool torch = torch_parallel_for.load(std::memory_order_acquire) && !pool::forked();
  return torch ? Backend::torch : Backend::pool;
}

int cpu_count() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}
std::atomic<int> pool_threads{0};

class ScratchBuffer {
 public:
  ~ScratchBuffer() { release(); }
  void* get(size_t bytes) {
    if (bytes <= size_) return data_;
    release();
    size_t rounded = (bytes + kGranule - 1) / kGranule * kGranule;
    void* p = mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return nullptr;
    if (rounded >= kHugePage) madvise(p, rounded, MADV_HUGEPAGE);
    data_ = p;
    size_ = rounded;
    return p;
  }

 private:
  static constexpr size_t kGranule = 64 << 10, kHugePage = 2 << 20;
  void* data_ = nullptr;
  size_t size_ = 0;
  void release() {
    if (data_) munmap(data_, size_);
    data_ = nullptr;
    size_ = 0;
  }
};

}  // namespace

bool attach_torch_threads() {
  if (torch_parallel_for.load(std::memory_order_acquire)) return true;
  void* torch = torch_library();
  if (!torch) return false;
  auto run = reinterpret_cast<TorchParallelFor>(dlsym(torch, "torch_parallel_for"));
  auto count = reinterpret_cast<TorchNumThreads>(dlsym(torch, "torch_get_num_threads"));
  if (!run || !count) return false;
  torch_num_threads.store(count, std::memory_order_relaxed);
  torch_parallel_for.store(run, std::memory_order_release);
  return true;
}

const char* thread_backend() {
  switch (backend()) {
    case Backend::serial: return "serial";
    case Backend::torch: return "torch";
    default: return "pool";
  }
}

int num_threads() {
  if (backend() == Backend::serial) return 1;
  if (torch_parallel_for.load(std::memory_order_acquire)) {
    uint32_t count = 1;
    torch_num_threads.load(std::memory_order_relaxed)(&count);
    return static_cast<int>(count);
  }
  const int chosen = pool_threads.load(std::memory_order_relaxed);
  static const int cpus = cpu_count();
  return chosen > 0 ? chosen : cpus;
}

void set_num_threads(int n) {
  pool_threads.store(n, std::memory_order_relaxed);
}

void parallel_for(int64_t n, int64_t grain, RangeBody body, void* context) {
  if (n <= 0) return;
  if (grain < 1) grain = 1;
  const Backend where = backend();
  if (n <= grain || where == Backend::serial) {
    body(0, n, context);
    return;
  }
  if (where == Backend::torch) {
    // Fails only when a body throws, which bodies must not.
    if (torch_parallel_for.load(std::memory_order_acquire)(0, n, grain, body, context) != 0) std::abort();
    return;
  }
  const int threads = num_threads();
  const int64_t quarter_share = (n + 4 * threads - 1) / (4 * threads);  // a starved worker costs a quarter, not all
  pool::run(threads, n, quarter_share > grain ? quarter_share : grain, body, context);
}

void* scratch(int slot, size_t bytes) {
  static thread_local ScratchBuffer buffers[kScratchSlots];
  return buffers[slot].get(bytes);
}

Runtime make_runtime(void* stream) {
  return {&parallel_for, &num_threads, &scratch, stream, nullptr};
}

}  // namespace tilewise
