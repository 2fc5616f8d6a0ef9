// What the Hopper kernels share: rings of stages that producer warps fill and two consumer warpgroups read.
#pragma once
#include "simt/simt.h"

namespace tilewise::attention {

using namespace simt;

constexpr int kConsumerThreads = 2 * 128;  // behind the producer's warpgroup

// Where in a ring of stages a role is. A stage has a barrier for "full", which `Copiers` arrive at, and one for
// "empty", which every consumer warp does.
template <int Stages, int Copiers = 1>
struct Ring {
  int used = 0;
  SIMT_DEVICE int stage() const { return used % Stages; }
  SIMT_DEVICE uint32_t phase() const { return static_cast<uint32_t>(used / Stages) & 1; }
  SIMT_DEVICE bool reused() const { return used >= Stages; }

  SIMT_DEVICE static void init(uint64_t* full, uint64_t* empty) {
    for (int i = 0; i < Stages; i++) {
      mbar_init(&full[i], Copiers);
      mbar_init(&empty[i], kConsumerThreads / kWarp);
    }
  }
  // Producer: until everyone has done with what the stage held.
  SIMT_DEVICE void await_empty(uint64_t* empty) const {
    if (reused()) mbar_wait(&empty[stage()], phase() ^ 1);
  }
  // Consumers: until the stage has arrived.
  SIMT_DEVICE void await_full(uint64_t* full) const { mbar_wait(&full[stage()], phase()); }
};

// One arrival per warp: each has waited for its own products.
SIMT_DEVICE void release(uint64_t* empty) {
  sync_warp();
  if (lane_id() == 0) mbar_arrive(empty);
}

// Zeros in rows [first, Rows) of Tiles tiles of D columns, by both consumer groups together; they meet at `barrier`.
// Rows are 128 bytes of an atom, so the swizzle does not matter.
template <int Rows, int D, int Tiles, class T>
SIMT_DEVICE void clear_rows(T* tiles, int first, int barrier) {
  constexpr int kChunks = D / 8;
  for (int i = thread_id() - 128; i < Tiles * (Rows - first) * kChunks; i += kConsumerThreads) {
    const int row = first + i / Tiles / kChunks, chunk = i / Tiles % kChunks;
    store16(tiles + i % Tiles * (Rows * D) + chunk / 8 * (Rows * 64) + row * 64 + chunk % 8 * 8, uint4{0, 0, 0, 0});
  }
  fence_proxy_async();  // wgmma reads through the async proxy
  bar_sync(barrier, kConsumerThreads);
}

// The first warpgroup gives its registers to the others. `Kernel` has init_barriers, produce, of kProducerWarps warps,
// and consume.
template <class Kernel, int ProducerRegisters, int ConsumerRegisters, class Params, class Smem>
SIMT_DEVICE void run_roles(const Params& a, Smem& s) {
  if (thread_id() == 0) {
    Kernel::init_barriers(s);
    fence_mbar_init();
  }
  sync_block();
  if (warp_id() < 4) {
    reg_dealloc<ProducerRegisters>();
    if (warp_id() < Kernel::kProducerWarps) Kernel::produce(a, s);
  } else {
    reg_alloc<ConsumerRegisters>();
    Kernel::consume(a, s);
  }
}

}  // namespace tilewise::attention
