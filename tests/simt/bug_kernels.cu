// Kernels with seeded bugs for the detector matrix (test_detectors.py). Each kernel is correct when run as "clean";
// any other name plants the one bug of that name.
#include <atomic>
#include <memory>

#include "probe.h"

namespace probes {
namespace {

struct BugParams {
  float* x;       // in and out
  uint32_t* aux;  // counters, partial sums
  int n;          // elements of x
  uint32_t bug;
};

// ---- a block that exchanges values through shared memory: x[i] of each block is reversed and doubled ----

struct Exchange {
  static constexpr int kThreads = 128, kMinArch = 800;
  using Params = BugParams;
  struct Smem {
    alignas(16) float a[kThreads];
    alignas(16) float b[kThreads];
  };

  static SIMT_DEVICE void plant_addresses(uint32_t bug, const Params& p, Smem& s) {
    const int t = thread_id();
    float* end = s.b + p.n - 128;  // the compiler must not see that this is past the end
    if (bug == id("smem_write_past_end")) end[t] = 1.f;
    if (bug == id("smem_read_past_end")) s.b[t] = 0.f * end[t % 8];
    if (bug == id("global_write_past_end") && t == 127) p.x[p.n] = 1.f;
    if (bug == id("misaligned_load16") && t == 0) store16(s.b, load16(p.x + 1));
    if (bug == id("misaligned_cp_async") && t == 0) cp_async16(s.b + 1, p.x);
    if (bug == id("smem_addr_of_global") && t == 0) s.b[0] = static_cast<float>(smem_addr(p.x));
    if (bug == id("int_overflow")) s.b[t] = static_cast<float>(2147483547 + p.n / 2 + t - t);
  }

  static SIMT_DEVICE void plant_collectives(uint32_t bug) {
    const int lane = lane_id();
    if (bug == id("divergent_shuffle") && lane < 16) shfl_xor(1.f, 1);
    if (bug == id("overlapping_masks")) {
      if (lane < 16) {
        shfl_xor(1.f, 1, 0x0001ffffu);
      } else {
        shfl_xor(1.f, 1, 0xffff0000u);
      }
    }
    if (bug == id("lane_outside_mask")) shfl_xor(1.f, 1, 0x0000ffffu);
    if (bug == id("shuffle_from_outside") && lane < 16) shfl_xor(1.f, 16, 0x0000ffffu);
    if (bug == id("different_collectives")) {
      if (lane < 16) {
        warp_any(true);
      } else {
        redux_add(1u);
      }
    }
  }

  static SIMT_DEVICE void plant_barriers(uint32_t bug) {
    const int t = thread_id();
    if (bug == id("divergent_barrier")) {
      if (t < 7) {
        sync_block();
      } else {
        sync_block();
      }
    }
    if (bug == id("barrier_not_reached") && t >= 32) sync_block();
    if (bug == id("named_barrier_counts")) bar_sync(1, t < 64 ? 64 : 128);
    if (bug == id("named_barrier_odd")) bar_sync(1, 100);
    if (bug == id("named_barrier_deadlock") && t < 64) bar_sync(2, 96);
    if (bug == id("barrier_id")) bar_sync(16, 128);
  }

  static SIMT_DEVICE void run(const Params& p, Smem& s) {
    const uint32_t bug = p.bug;
    const int t = thread_id(), i = static_cast<int>(block_idx().x) * kThreads + t;
    plant_addresses(bug, p, s);
    if (bug != id("uninitialised") || t != 5) s.a[t] = p.x[i];
    if (bug != id("missing_barrier")) sync_block();
    plant_collectives(bug);
    plant_barriers(bug);
    if (bug == id("exit_before_barrier") && t >= 96) return;
    float v = s.a[kThreads - 1 - t];
    if (bug != id("missing_second_barrier")) sync_block();
    s.a[t] = v;  // every thread has read what this overwrites
    if (bug == id("shuffle_is_no_barrier")) {
      v += 0.f * shfl_xor(v, 1);
    } else if (bug != id("missing_sync_warp")) {
      sync_warp();
    }
    v = 0.5f * (s.a[t ^ 1] + v) + 0.5f * (v - s.a[t ^ 1]);
    v += s.a[t];
    if (bug == id("inter_block_race") && t == 0) p.x[0] = v;
    if (bug == id("inter_block_read")) v += 0.f * p.x[(i + kThreads) % p.n];
    if (bug == id("spin_on_atomic")) {
      while (atomic_add(p.aux, 0u) != 12345u) {
      }
    }
    if (bug == id("spin_on_memory")) {
      while (*static_cast<volatile uint32_t*>(p.aux) != 12345u) {
      }
    }
    p.x[i] = v;
  }
};

// ---- double-buffered cp.async: x = running sums over 8 tiles ----

struct Pipeline {
  static constexpr int kThreads = 64, kMinArch = 800, kTiles = 8;
  using Params = BugParams;
  struct Smem {
    alignas(16) float stage[2][kThreads * 4];
  };

  static SIMT_DEVICE void fetch(const Params& p, Smem& s, int tile) {
    if (tile < kTiles) cp_async16(s.stage[tile & 1] + thread_id() * 4, p.x + (tile * kThreads + thread_id()) * 4);
    cp_async_commit();
  }

  static SIMT_DEVICE void run(const Params& p, Smem& s) {
    const uint32_t bug = p.bug;
    float sum = 0.f;
    fetch(p, s, 0);
    for (int tile = 0; tile < kTiles; tile++) {
      fetch(p, s, tile + 1);
      if (bug == id("no_copy_wait")) {
        cp_async_wait<2>();
      } else {
        cp_async_wait<1>();
      }
      if (bug != id("no_barrier_after_wait")) sync_block();
      const float* stage = s.stage[tile & 1];
      for (int i = 0; i < 4; i++) sum += stage[(thread_id() * 4 + i * 4 + 64) % (kThreads * 4)];
      if (bug != id("refill_too_early")) sync_block();
    }
    reinterpret_cast<float*>(p.aux)[thread_id()] = sum;
  }
};

// ---- the last block to finish adds up the others' partial sums ----

struct LastBlock {
  static constexpr int kThreads = 64, kMinArch = 800;
  using Params = BugParams;  // aux: [0] counter, [1 + block] partial sums; the result goes to x[0]
  struct Smem {
    bool is_last;
  };

  static SIMT_DEVICE void run(const Params& p, Smem& s) {
    const uint32_t bug = p.bug;
    const int block = static_cast<int>(block_idx().x), blocks = static_cast<int>(grid_dim().x);
    auto* partial = reinterpret_cast<float*>(p.aux + 1);
    const float sum = warp_sum(p.x[block * kThreads + thread_id()]);
    if (thread_id() == 0) partial[block] = sum;
    if (thread_id() == 0) {
      if (bug != id("no_release_fence")) fence_device();
      s.is_last = atomic_add(p.aux, 1u) == static_cast<uint32_t>(blocks - 1);
      if (bug != id("no_acquire_fence")) fence_device();
    }
    sync_block();
    if (!s.is_last) return;
    if (thread_id() == 32) {  // not the thread that took the ticket
      float total = 0.f;
      for (int b = 0; b < blocks; b++) total += partial[b];
      p.x[0] = total;
    }
  }
};

// ---- operands that the instructions reject ----

struct Operands {
  static constexpr int kThreads = 32, kMinArch = 800;
  using Params = BugParams;
  struct Smem {
    alignas(16) uint32_t rows[kWarp][4];
  };

  static SIMT_DEVICE void run(const Params& p, Smem& s) {
    float d[4] = {};
    const uint32_t a[4] = {}, b[4] = {};
    uint32_t r[4];
    uint32_t metadata = 0x44444444u, operand = to_tf32(1.1f);
    if (p.bug == id("metadata_equal")) metadata = 0x44044444u;
    if (p.bug == id("metadata_descending")) metadata = 0x44441444u;
    if (p.bug == id("tf32_not_rounded")) operand = f32_bits(1.1f);
    for (int w = 0; w < 4; w++) s.rows[lane_id()][w] = 0;
    sync_warp();
    mma_sp_m16n8k32<bf16, 0>(d, a, b, metadata);
    mma_m16n8k8_tf32(d, a, operand, 0u);
    const char* row = reinterpret_cast<const char*>(s.rows[lane_id()]);
    if (p.bug == id("ldmatrix_misaligned")) row += 4;
    if (p.bug == id("ldmatrix_past_end")) row += 16 * 8;
    ldmatrix_x4(r, row);
    p.x[thread_id()] = d[0] + static_cast<float>(r[0]);
  }
};

}  // namespace

// Host code beside the kernels may use what every C++ file uses: the race build must still load.
SIMT_EXPORT int simt_host_code(int v) {
  static const int first = v;  // its guard is atomic
  static std::atomic<uint64_t> calls{0};
  const auto shared = std::make_shared<int>(first);
  return *shared + static_cast<int>(++calls);
}

SIMT_EXPORT const char* simt_bug(const char* kernel, const char* bug, float* x, uint32_t* aux, int n, int blocks) {
  const BugParams p{x, aux, n, id(bug)};
  const dim3 grid(static_cast<unsigned>(blocks));
  switch (id(kernel)) {
    case id("exchange"): return launch<Exchange>(grid, p, nullptr);
    case id("pipeline"): return launch<Pipeline>(grid, p, nullptr);
    case id("last_block"): return launch<LastBlock>(grid, p, nullptr);
    case id("operands"): return launch<Operands>(grid, p, nullptr);
  }
  return "no such kernel";
}

}  // namespace probes
