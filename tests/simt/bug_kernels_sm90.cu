// A small Hopper GEMM with seeded bugs for the detector matrix: TMA producer, wgmma consumer, TMA store.
#include "probe.h"

namespace probes {
namespace {

// C[64, 64] = A[64, 64 steps] B[64, 64 steps]^T in bf16. Warpgroup 0 multiplies, one thread of warpgroup 1 loads.
struct Gemm {
  static constexpr int kThreads = 256, kMinArch = kSm90a, kStages = 2;
  static constexpr uint32_t kTileBytes = 64 * 64 * 2;
  struct Params {
    TensorMap a, b, c;
    float* sink;
    int steps;
    uint32_t bug;
  };
  struct Smem {
    alignas(1024) bf16 a[kStages][64 * 64];
    alignas(1024) bf16 b[kStages][64 * 64];
    alignas(1024) bf16 c[64 * 64];
    uint64_t full[kStages], empty[kStages], never_initialised;
  };

  static SIMT_DEVICE void init(const Params& p, Smem& s) {
    if (thread_id() == 0) {
      for (int i = 0; i < kStages; i++) {
        mbar_init(&s.full[i], 1);
        mbar_init(&s.empty[i], 128);
      }
      fence_mbar_init();
    }
    if (p.bug != id("no_barrier_after_init")) sync_block();
  }

  // ---- producer ----

  static SIMT_DEVICE uint32_t announced_bytes(uint32_t bug) {
    if (bug == id("tx_too_large")) return 2 * kTileBytes + 16;
    if (bug == id("tx_too_small")) return kTileBytes;
    return 2 * kTileBytes;
  }

  static SIMT_DEVICE void load(const Params& p, Smem& s, int step) {
    const uint32_t bug = p.bug;
    const int stage = step % kStages;
    uint64_t* full = bug == id("mbarrier_uninitialised") ? &s.never_initialised : &s.full[stage];
    if (step >= kStages && bug != id("no_empty_wait")) mbar_wait(&s.empty[stage], (step / kStages - 1) & 1);
    mbar_arrive_expect_tx(full, announced_bytes(bug));
    if (bug == id("too_many_arrivals")) mbar_arrive(full);
    bf16* a = s.a[stage];
    if (bug == id("tile_misaligned")) a += 64;
    if (bug == id("tile_past_end")) a += 1024 / 2 * 40;
    if (bug == id("wrong_rank")) {
      tma_load_3d(a, &p.a, full, step * 64, 0, 0);
    } else {
      tma_load_2d(a, &p.a, full, step * 64, 0);
    }
    tma_load_2d(s.b[stage], &p.b, full, step * 64, 0);
  }

  static SIMT_DEVICE void produce(const Params& p, Smem& s) {
    if (p.bug == id("too_many_registers")) {
      reg_dealloc<248>();
    } else {
      reg_dealloc<40>();
    }
    if (p.bug == id("divergent_warpgroup") && warp_id() == 5) wgmma_fence();
    if (p.bug == id("divergent_warpgroup") && warp_id() == 6) wgmma_commit();
    if (warp_id() != 4 || !elect_one()) return;
    for (int step = 0; step < p.steps; step++) load(p, s, step);
  }

  // ---- consumer ----

  static SIMT_DEVICE void multiply(const Params& p, Smem& s, int stage, bool first, float (&d)[32]) {
    const uint32_t bug = p.bug;
    if (bug != id("no_wgmma_fence")) wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4; kk++) {
      uint64_t a = wgmma_desc_sw128(smem_addr(s.a[stage]) + kk * 32, 16, 1024);
      uint64_t b = wgmma_desc_sw128(smem_addr(s.b[stage]) + kk * 32, 16, 1024);
      if (bug == id("descriptor_past_end")) b = wgmma_desc_sw128(smem_addr(s.c) + 4096, 16, 1024);
      if (bug == id("descriptors_differ") && lane_id() == 7) a = wgmma_desc_advance(a, 1024);
      wgmma_ss<bf16, 64, 0>(d, a, b, !first || kk > 0);
    }
    wgmma_commit();
  }

  static SIMT_DEVICE void generic_write(Smem& s, int stage, bool with_fence) {
    const uint32_t v = load4(&s.a[stage][2 * thread_id()]);
    bar_sync(1, 128);
    store4(&s.a[stage][2 * thread_id()], v);
    if (with_fence) fence_proxy_async();
    bar_sync(2, 128);
  }

  static SIMT_DEVICE void consume_tile(const Params& p, Smem& s, int step, float (&d)[32]) {
    const uint32_t bug = p.bug;
    const int stage = step % kStages;
    if (bug != id("no_full_wait")) mbar_wait(&s.full[stage], step / kStages & 1);
    if (bug == id("generic_write_fenced")) generic_write(s, stage, true);
    if (bug == id("generic_write_unfenced")) generic_write(s, stage, false);
    multiply(p, s, stage, step == 0, d);
    if (bug == id("early_release")) mbar_arrive(&s.empty[stage]);
    if (bug == id("accumulator_read_in_flight")) p.sink[thread_id()] = d[0];
    if (bug == id("accumulator_written_in_flight")) d[3] = 0.f;
    if (bug == id("exit_with_wgmma_in_flight") && step == p.steps - 1) return;
    wgmma_wait<0>(d);
    if (bug != id("early_release") && bug != id("missing_arrive")) mbar_arrive(&s.empty[stage]);
  }

  // Accumulators to a 128-byte-swizzled tile in shared memory, from there one TMA store.
  static SIMT_DEVICE void store(const Params& p, Smem& s, const float (&d)[32]) {
    const uint32_t bug = p.bug;
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
      const int row = warp_id() * 16 + lane_id() / 4 + i / 2 % 2 * 8, chunk = i / 4;
      store4(s.c + row * 64 + (chunk ^ (row & 7)) * 8 + lane_id() % 4 * 2, pack2<bf16>(d[i], d[i + 1]));
    }
    if (bug != id("missing_proxy_fence")) fence_proxy_async();
    bar_sync(1, 128);
    if (thread_id() == 0) {
      tma_store_2d(&p.c, s.c, 0, 0);
      bulk_commit();
      if (bug == id("store_tile_reused_early")) s.c[5] = bf16{0};
      if (bug != id("exit_before_store_is_read")) bulk_wait_read<0>();
    }
  }

  static SIMT_DEVICE void consume(const Params& p, Smem& s) {
    if (p.bug == id("too_many_registers")) {
      reg_alloc<256>();
    } else {
      reg_alloc<248>();
    }
    float d[32] = {};
    for (int step = 0; step < p.steps; step++) consume_tile(p, s, step, d);
    if (p.bug == id("exit_with_wgmma_in_flight")) return;
    store(p, s, d);
  }

  static SIMT_DEVICE void run(const Params& p, Smem& s) {
    init(p, s);
    if (warp_id() >= 4) {
      produce(p, s);
    } else {
      consume(p, s);
    }
  }
};

// A fragments in registers: they must not change before the wait.
struct RegisterOperand {
  static constexpr int kThreads = 128, kMinArch = kSm90a;
  struct Params {
    float* out;
    uint32_t bug;
  };
  struct Smem {
    alignas(1024) bf16 b[64 * 64];
  };

  static SIMT_DEVICE void run(const Params& p, Smem& s) {
    for (int i = thread_id(); i < 64 * 64; i += kThreads) s.b[i] = from_f32<bf16>(1.f);
    fence_proxy_async();
    sync_block();
    uint32_t a[4];
    for (int i = 0; i < 4; i++) a[i] = pack2<bf16>(1.f, 1.f);
    float d[32] = {};
    wgmma_fence();
    wgmma_rs<bf16, 64, 0>(d, a, wgmma_desc_sw128(smem_addr(s.b), 16, 1024), false);
    wgmma_commit();
    if (p.bug == id("fragment_changed_in_flight") && thread_id() == 9) a[2] = 0;
    wgmma_wait<0>(d);
    for (int i = 0; i < 4; i++) p.out[thread_id()] = d[i] + 0.f * bits_f32(a[i] & 0xffff);
  }
};

}  // namespace

SIMT_EXPORT const char* simt_bug_gemm(const char* bug, const void* a, const void* b, void* c, float* sink, int steps) {
  Gemm::Params p{};
  const uint64_t k = 64u * static_cast<unsigned>(steps);
  const char* error = make_tensor_map_2d_sw128(&p.a, a, 2, k, 64, k * 2, 64, 64);
  if (!error) error = make_tensor_map_2d_sw128(&p.b, b, 2, k, 64, k * 2, 64, 64);
  if (!error) error = make_tensor_map_2d_sw128(&p.c, c, 2, 64, 64, 128, 64, 64);
  if (error) return error;
  p.sink = sink;
  p.steps = steps;
  p.bug = id(bug);
  return launch<Gemm>(dim3(1), p, nullptr);
}

SIMT_EXPORT const char* simt_bug_register_operand(const char* bug, float* out) {
  return launch<RegisterOperand>(dim3(1), {out, id(bug)}, nullptr);
}

}  // namespace probes
