// Probes of the sm_90 instructions: stmatrix, bulk copies, TMA with its swizzle and bounds, wgmma with its descriptors
// and fragments. Raw memory in, raw memory out; golden.py holds the models.
#include "probe.h"

namespace probes {

// ---- stmatrix: words 0-3 are the registers, word 4 the row whose address this lane gives; out: this lane's row ----

struct StoreMatrixProbe {
  static constexpr int kThreads = 32, kMinArch = 900;
  using Params = probes::Params;
  struct Smem {
    alignas(16) uint32_t rows[kWarp][4];
  };

  static SIMT_DEVICE void run(const Params& p, Smem& s) {
    const size_t i = static_cast<size_t>(block_idx().x * kThreads + thread_id()) * kWords;
    const uint32_t r[4] = {p.in[i], p.in[i + 1], p.in[i + 2], p.in[i + 3]};
    uint32_t* row = s.rows[p.in[i + 4] % kWarp];
    if (p.op == id("stmatrix_x4")) stmatrix_x4(row, r);
    if (p.op == id("stmatrix_x4_trans")) stmatrix_x4_trans(row, r);
    sync_warp();
    store16(p.out + i, load16(s.rows[lane_id()]));
  }
};

// ---- bulk copies: through shared memory and back ----

struct BulkProbe {
  static constexpr int kThreads = 32, kMinArch = 900, kMaxBytes = 8192;
  struct Params {
    const void* in;
    void* out;
    uint32_t bytes;
  };
  struct Smem {
    alignas(16) unsigned char tile[kMaxBytes];
    uint64_t full;
  };

  static SIMT_DEVICE void run(const Params& p, Smem& s) {
    if (thread_id() == 0) {
      mbar_init(&s.full, 1);
      fence_mbar_init();
      mbar_arrive_expect_tx(&s.full, p.bytes);
      bulk_load(s.tile, p.in, p.bytes, &s.full);
      mbar_wait(&s.full, 0);
      bulk_store(p.out, s.tile, p.bytes);
      bulk_commit();
      bulk_wait_read<0>();
    }
  }
};

// ---- TMA: a box of a 16-bit tensor to shared memory and out as it lies there, or the other way ----

struct TmaProbe {
  static constexpr int kThreads = 128, kMinArch = 900, kMaxBytes = 16384;
  struct Params {
    TensorMap map;
    int rank;
    int c[5];
    bool store;
    uint32_t bytes;
    uint32_t* tile;
  };
  struct Smem {
    alignas(1024) uint32_t tile[kMaxBytes / 4];
    uint64_t full;
  };

  static SIMT_DEVICE void load(const Params& p, Smem& s) {
    const int* c = p.c;
    if (p.rank == 2) tma_load_2d(s.tile, &p.map, &s.full, c[0], c[1]);
    if (p.rank == 3) tma_load_3d(s.tile, &p.map, &s.full, c[0], c[1], c[2]);
    if (p.rank == 4) tma_load_4d(s.tile, &p.map, &s.full, c[0], c[1], c[2], c[3]);
    if (p.rank == 5) tma_load_5d(s.tile, &p.map, &s.full, c[0], c[1], c[2], c[3], c[4]);
  }
  static SIMT_DEVICE void store(const Params& p, Smem& s) {
    const int* c = p.c;
    if (p.rank == 2) tma_store_2d(&p.map, s.tile, c[0], c[1]);
    if (p.rank == 3) tma_store_3d(&p.map, s.tile, c[0], c[1], c[2]);
    if (p.rank == 4) tma_store_4d(&p.map, s.tile, c[0], c[1], c[2], c[3]);
    if (p.rank == 5) tma_store_5d(&p.map, s.tile, c[0], c[1], c[2], c[3], c[4]);
  }

  static SIMT_DEVICE void run_load(const Params& p, Smem& s) {
    if (thread_id() == 0) {
      mbar_init(&s.full, 1);
      fence_mbar_init();
      prefetch_tensor_map(&p.map);
      mbar_arrive_expect_tx(&s.full, p.bytes);
      load(p, s);
    }
    sync_block();
    mbar_wait(&s.full, 0);
    for (uint32_t i = thread_id(); i < p.bytes / 4; i += kThreads) p.tile[i] = s.tile[i];
  }
  static SIMT_DEVICE void run_store(const Params& p, Smem& s) {
    for (uint32_t i = thread_id(); i < p.bytes / 4; i += kThreads) s.tile[i] = p.tile[i];
    fence_proxy_async();
    sync_block();
    if (thread_id() == 0) {
      store(p, s);
      bulk_commit();
      bulk_wait_read<0>();
    }
  }
  static SIMT_DEVICE void run(const Params& p, Smem& s) {
    if (p.store) {
      run_store(p, s);
    } else {
      run_load(p, s);
    }
  }
};

// ---- wgmma: one 64 x N x 64 product by one warpgroup, raw accumulators out ----

template <class T, int N, bool NMajorB, bool RegisterA, bool MMajorA>
struct WgmmaProbe {
  static constexpr int kThreads = 128, kMinArch = kSm90a;
  struct Params {
    TensorMap a;  // [64, 64]: (m, k), or (k, m) if MMajorA
    TensorMap b;  // [N, 64]: (n, k), or rank 3 (64, 64, N / 64) over [64, N]: (k, n) if NMajorB
    const T* global_a;
    float* d;  // [128 threads][N / 2]
  };
  struct Smem {
    alignas(1024) T a[64 * 64];
    alignas(1024) T b[64 * N];
    uint64_t full;
  };

  static SIMT_DEVICE void load(const Params& p, Smem& s) {
    mbar_init(&s.full, 1);
    fence_mbar_init();
    mbar_arrive_expect_tx(&s.full, sizeof(s.a) + sizeof(s.b));
    tma_load_2d(s.a, &p.a, &s.full, 0, 0);
    if (NMajorB) {
      tma_load_3d(s.b, &p.b, &s.full, 0, 0, 0);
    } else {
      tma_load_2d(s.b, &p.b, &s.full, 0, 0);
    }
  }

  // Register j of step kk: rows + 8 for odd j, columns + 8 for j >= 2.
  static SIMT_DEVICE void load_fragments(const T* a, uint32_t (&fragments)[4][4]) {
    const int row = warp_id() * 16 + lane_id() / 4, column = lane_id() % 4 * 2;
#pragma unroll
    for (int kk = 0; kk < 4; kk++) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        fragments[kk][j] = load4(a + (row + j % 2 * 8) * 64 + kk * 16 + j / 2 * 8 + column);
      }
    }
  }

  static SIMT_DEVICE void run(const Params& p, Smem& s) {
    if (thread_id() == 0) load(p, s);
    uint32_t fragments[4][4];
    load_fragments(p.global_a, fragments);
    sync_block();
    mbar_wait(&s.full, 0);
    float d[N / 2] = {};
    const uint64_t a = wgmma_desc_sw128(smem_addr(s.a), 16, 1024);
    const uint64_t b = wgmma_desc_sw128(smem_addr(s.b), NMajorB ? 64 * 128 : 16, 1024);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4; kk++) {
      const uint64_t bk = wgmma_desc_advance(b, kk * (NMajorB ? 2048 : 32));
      const uint64_t ak = wgmma_desc_advance(a, kk * (MMajorA ? 2048 : 32));
      if constexpr (RegisterA) {
        wgmma_rs<T, N, NMajorB>(d, fragments[kk], bk, kk > 0);
      } else {
        wgmma_ss<T, N, NMajorB, MMajorA>(d, ak, bk, kk > 0);
      }
    }
    wgmma_commit();
    wgmma_wait<0>(d);
#pragma unroll
    for (int i = 0; i < N / 2; i++) p.d[thread_id() * (N / 2) + i] = d[i];
  }
};

template <class T, int N, bool NMajorB, bool RegisterA, bool MMajorA = false>
const char* run_wgmma(const void* a, const void* b, float* d, void* stream) {
  using K = WgmmaProbe<T, N, NMajorB, RegisterA, MMajorA>;
  typename K::Params p{};
  const uint64_t dims[3] = {64, 64, N / 64}, strides[2] = {N * 2, 128};
  const uint32_t box[3] = {64, 64, N / 64};
  const char* error = make_tensor_map_2d_sw128(&p.a, a, 2, 64, 64, 128, 64, 64);
  if (!error && NMajorB) error = make_tensor_map_sw128(&p.b, b, 2, 3, dims, strides, box);
  if (!error && !NMajorB) error = make_tensor_map_2d_sw128(&p.b, b, 2, 64, N, 128, 64, N);
  if (error) return error;
  p.global_a = static_cast<const T*>(a);
  p.d = d;
  return launch<K>(dim3(1), p, stream);
}

SIMT_EXPORT const char* simt_stmatrix_probe(const char* name, const uint32_t* in, uint32_t* out, int blocks,
                                            void* stream) {
  return launch<StoreMatrixProbe>(dim3(static_cast<unsigned>(blocks)), {in, out, id(name)}, stream);
}

SIMT_EXPORT const char* simt_bulk_probe(const void* in, void* out, uint32_t bytes, void* stream) {
  if (bytes > BulkProbe::kMaxBytes) return "bulk probe: too many bytes";
  return launch<BulkProbe>(dim3(1), {in, out, bytes}, stream);
}

SIMT_EXPORT const char* simt_tma_probe(int store, int rank, const uint64_t* dims, const uint32_t* box,
                                       const int32_t* coords, void* tensor, uint32_t* tile, void* stream) {
  TmaProbe::Params p{};
  uint64_t strides[4];
  uint64_t row_bytes = 2;
  uint32_t bytes = 2;
  for (int i = 0; i < rank; i++) {
    row_bytes *= dims[i];
    if (i < rank - 1) strides[i] = row_bytes;
    bytes *= box[i];
    p.c[i] = coords[i];
  }
  if (bytes > TmaProbe::kMaxBytes) return "tma probe: box too large";
  if (const char* error = make_tensor_map_sw128(&p.map, tensor, 2, rank, dims, strides, box)) return error;
  p.rank = rank;
  p.store = store != 0;
  p.bytes = bytes;
  p.tile = tile;
  return launch<TmaProbe>(dim3(1), p, stream);
}

SIMT_EXPORT const char* simt_wgmma_probe(const char* name, const void* a, const void* b, float* d, void* stream) {
  switch (id(name)) {
    case id("bf16_n8"): return run_wgmma<bf16, 8, false, false>(a, b, d, stream);
    case id("bf16_n64"): return run_wgmma<bf16, 64, false, false>(a, b, d, stream);
    case id("bf16_n64_nmajor"): return run_wgmma<bf16, 64, true, false>(a, b, d, stream);
    case id("bf16_n64_mmajor"): return run_wgmma<bf16, 64, false, false, true>(a, b, d, stream);
    case id("fp16_n128_mmajor_nmajor"): return run_wgmma<fp16, 128, true, false, true>(a, b, d, stream);
    case id("bf16_n128_nmajor_rs"): return run_wgmma<bf16, 128, true, true>(a, b, d, stream);
    case id("bf16_n176_rs"): return run_wgmma<bf16, 176, false, true>(a, b, d, stream);
    case id("bf16_n256"): return run_wgmma<bf16, 256, false, false>(a, b, d, stream);
    case id("fp16_n256_nmajor_rs"): return run_wgmma<fp16, 256, true, true>(a, b, d, stream);
  }
  return "no such wgmma probe";
}

}  // namespace probes
