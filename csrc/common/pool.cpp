#include "common/pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <mutex>
#include <thread>

namespace tilewise::pool {
namespace {

thread_local bool inside = false;

void futex_wait(std::atomic<uint32_t>& word, uint32_t seen) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}
void futex_wake(std::atomic<uint32_t>& word, int count) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
}

constexpr int64_t kMaxChunks = 0xffff;

class Pool {
 public:
  void run(int threads, int64_t n, int64_t chunk, RangeBody body, void* context) {
    if (!owner_.try_lock()) {  // another thread's job: do not wait for it
      body(0, n, context);
      return;
    }
    start_workers(threads - 1);
    chunk_ = std::max(chunk, (n + kMaxChunks - 1) / kMaxChunks);
    body_ = body;
    context_ = context;
    n_ = n;
    const auto chunks = static_cast<uint32_t>((n + chunk_ - 1) / chunk_);
    publish(chunks, threads - 1);
    inside = true;
    while (claim_one()) {
    }
    inside = false;
    for (uint32_t done; (done = done_.load(std::memory_order_acquire)) != chunks;) futex_wait(done_, done);
    owner_.unlock();
  }

 private:
  // ticket = epoch : 32 | chunks : 16 | next : 16. A successful exchange both claims a chunk and proves that the job's
  // fields read before it belong to that epoch.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<uint32_t> done_{0};
  alignas(64) std::atomic<uint32_t> jobs_{0};  // the word on which workers sleep
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<int> limit_{0};  // workers with a larger number stay out of this job
  std::mutex owner_;
  RangeBody body_ = nullptr;
  void* context_ = nullptr;
  int64_t n_ = 0, chunk_ = 1;
  int started_ = 0;

  void publish(uint32_t chunks, int workers) {
    done_.store(0, std::memory_order_relaxed);
    limit_.store(workers, std::memory_order_relaxed);
    const uint64_t epoch = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    ticket_.store(epoch << 32 | uint64_t(chunks) << 16, std::memory_order_release);
    jobs_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst)) futex_wake(jobs_, INT_MAX);
  }

  bool claim_one() {
    uint64_t t = ticket_.load(std::memory_order_acquire);
    uint32_t chunks, next;
    do {
      chunks = t >> 16 & 0xffff;
      next = t & 0xffff;
      if (next >= chunks) return false;
    } while (!ticket_.compare_exchange_weak(t, t + 1, std::memory_order_acq_rel, std::memory_order_acquire));
    const int64_t begin = int64_t(next) * chunk_;
    body_(begin, std::min(begin + chunk_, n_), context_);
    if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == chunks) futex_wake(done_, 1);
    return true;
  }

  void worker(int number) {
    inside = true;
    for (uint32_t seen = 0;;) {
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      uint32_t now;
      while ((now = jobs_.load(std::memory_order_seq_cst)) == seen) futex_wait(jobs_, seen);
      sleepers_.fetch_sub(1, std::memory_order_relaxed);
      seen = now;
      if (number >= limit_.load(std::memory_order_relaxed)) continue;
      while (claim_one()) {
      }
    }
  }

  void start_workers(int wanted) {
    if (started_ >= wanted) return;
    sigset_t all, old;  // signals belong to the program's own threads
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    for (; started_ < wanted; started_++) std::thread([this, number = started_] { worker(number); }).detach();
    pthread_sigmask(SIG_SETMASK, &old, nullptr);
  }
};

Pool* instance = new Pool;  // never freed: workers outlive exit()
bool in_forked_child = false;

struct ForkHandler {
  ForkHandler() {
    pthread_atfork(nullptr, nullptr, [] {
      instance = new Pool;
      inside = false;
      in_forked_child = true;
    });
  }
} fork_handler;

}  // namespace

void run(int threads, int64_t n, int64_t chunk, RangeBody body, void* context) {
  if (threads < 2 || n <= chunk || inside) {
    body(0, n, context);
    return;
  }
  instance->run(threads, n, chunk, body, context);
}

bool forked() {
  return in_forked_child;
}

}  // namespace tilewise::pool
