// y^T = W x^T on the sparse tensor cores: W is operand A of mma.sp, which reads the portable format as it stands.
#pragma once
#include "sparse/cuda/tiles.h"

namespace tilewise::sparse {

// Blocks of kWarpsM x kWarpsN warps, each with 16 kTilesM outputs by 8 kTilesN rows of x.
template <class T, bool kAligned, int kWarpsM, int kWarpsN, int kTilesM, int kTilesN>
struct NmForward {
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN, kMinArch = 800;
  static constexpr int kOut = 16 * kTilesM * kWarpsM, kRows = 8 * kTilesN * kWarpsN, kDepth = 64, kStages = 3;
  static constexpr int kPad = 8;  // of the output tile: rows of different banks

  struct Params {
    NmForwardParams p;
    uint32_t* fault;
  };
  struct Stage {
    Tile<T, kOut, kDepth / 2> values;
    Tile<T, kRows, kDepth> x;
    alignas(16) uint8_t indices[kOut * kDepth / 8];
  };
  union Smem {
    Stage stages[kStages];
    uint16_t y[kRows * (kOut + kPad)];
  };
  using Acc = float[kTilesM][kTilesN][4];

  SIMT_DEVICE static void load_indices(const NmForwardParams& p, uint8_t* dst, int64_t o0, int64_t k0) {
    const int64_t row_bytes = ceil_div(p.in, int64_t{8});
#pragma unroll
    for (int i = 0; i < (kOut + kThreads - 1) / kThreads; i++) {
      const int row = i * kThreads + thread_id();
      if (row >= kOut) break;
      const bool valid = o0 + row < p.out;
      const uint8_t* src = p.indices + (o0 + row) * row_bytes + k0 / 8;
      if constexpr (kAligned) {
        cp_async8(dst + row * 8, src, valid);
      } else {
        for (int b = 0; b < 8; b++) dst[row * 8 + b] = valid && k0 / 8 + b < row_bytes ? src[b] : 0;
      }
    }
  }

  SIMT_DEVICE static void load_stage(const NmForwardParams& p, Stage& s, int64_t o0, int64_t r0, int64_t k0) {
    const T* values = static_cast<const T*>(p.values) + (o0 * p.in + k0) / 2;
    const T* x = static_cast<const T*>(p.x) + r0 * p.x_stride + k0;
    load_tile<kAligned, kThreads>(s.values, values, p.in / 2, p.out - o0, (p.in - k0) / 2);
    load_tile<kAligned, kThreads>(s.x, x, p.x_stride, p.rows - r0, p.in - k0);
    load_indices(p, s.indices, o0, k0);
  }

  // This lane's metadata of 16 outputs and 64 inputs: inputs 16 t .. 16 t + 15 of outputs g and g + 8. Lanes 0 and 1 of
  // a quad serve the first 32 inputs, lanes 2 and 3 the others.
  SIMT_DEVICE static uint32_t metadata(const Params& q, Stage& s, int row, int64_t o0, int64_t k0) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    const uint32_t m = load2(s.indices + (row + g) * 8 + 2 * t) | uint32_t(load2(s.indices + (row + g + 8) * 8 + 2 * t))
                                                                      << 16;
    const uint32_t illegal = illegal_nibbles(m);
    if (illegal) {  // padding, or a bad index
      const int64_t groups = (q.p.in - k0 - 16 * t) / 4;
      const uint32_t inside = groups >= 4 ? 0xffffu : groups <= 0 ? 0u : (1u << 4 * groups) - 1;
      const uint32_t rows = (o0 + row + g < q.p.out ? inside : 0) | (o0 + row + g + 8 < q.p.out ? inside << 16 : 0);
      if (illegal & rows) *q.fault = kBadSparseIndex;
    }
    return legalized(m, illegal);
  }

  template <int Step>
  SIMT_DEVICE static void multiply(Stage& s, Acc& acc, const uint32_t (&meta)[kTilesM], int row_m, int row_n) {
    uint32_t a[kTilesM][4];
#pragma unroll
    for (int i = 0; i < kTilesM; i++)
      ldmatrix_x4(a[i], s.values.chunk(row_m + 16 * i + lane_id() % 16, 2 * Step + lane_id() / 16));
#pragma unroll
    for (int j = 0; j < kTilesN; j++) {
      uint32_t b[4];
      ldmatrix_x4(b, s.x.chunk(row_n + 8 * j + lane_id() % 8, 4 * Step + lane_id() / 8));
#pragma unroll
      for (int i = 0; i < kTilesM; i++) mma_sp_m16n8k32<T, Step>(acc[i][j], a[i], b, meta[i]);
    }
  }

  SIMT_DEVICE static void run(const Params& q, Smem& smem) {
    const NmForwardParams& p = q.p;
    const int64_t o0 = int64_t{block_idx().x} * kOut, r0 = int64_t{block_idx().y} * kRows;
    const int row_m = warp_id() % kWarpsM * 16 * kTilesM, row_n = warp_id() / kWarpsM * 8 * kTilesN;
    const int tiles = int(ceil_div(p.in, int64_t{kDepth}));
    Acc acc = {};
#pragma unroll
    for (int t = 0; t < kStages - 1; t++) {
      if (t < tiles) load_stage(p, smem.stages[t], o0, r0, int64_t{t} * kDepth);
      cp_async_commit();
    }
    for (int t = 0; t < tiles; t++) {
      cp_async_wait<kStages - 2>();
      sync_block();  // tile t has landed, and nobody reads tile t - 1 any more
      const int next = t + kStages - 1;
      if (next < tiles) load_stage(p, smem.stages[next % kStages], o0, r0, int64_t{next} * kDepth);
      cp_async_commit();
      Stage& s = smem.stages[t % kStages];
      uint32_t meta[kTilesM];
#pragma unroll
      for (int i = 0; i < kTilesM; i++) meta[i] = metadata(q, s, row_m + 16 * i, o0, int64_t{t} * kDepth);
      multiply<0>(s, acc, meta, row_m, row_n);
      multiply<1>(s, acc, meta, row_m, row_n);
    }
    cp_async_wait<0>();
    sync_block();  // the output tile takes the place of the stages
    stage_output(p, smem.y, acc, o0, row_m, row_n);
    sync_block();
    write_output(p, smem.y, o0, r0);
  }

  // The transpose of the accumulators plus the bias, in T.
  SIMT_DEVICE static void stage_output(const NmForwardParams& p, uint16_t* y, const Acc& acc, int64_t o0, int row_m,
                                       int row_n) {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int i = 0; i < kTilesM; i++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int o = row_m + 16 * i + 8 * h + g;
        const float bias = p.bias && o0 + o < p.out ? to_f32(static_cast<const T*>(p.bias)[o0 + o]) : 0.f;
#pragma unroll
        for (int j = 0; j < kTilesN; j++) {
          uint16_t* at = y + (row_n + 8 * j + 2 * t) * (kOut + kPad) + o;
          store2(at, half_bits<T>(acc[i][j][2 * h] + bias));
          store2(at + kOut + kPad, half_bits<T>(acc[i][j][2 * h + 1] + bias));
        }
      }
    }
  }

  SIMT_DEVICE static void write_output(const NmForwardParams& p, const uint16_t* y, int64_t o0, int64_t r0) {
    constexpr int kChunks = kOut / 8;
    const bool whole = p.out % 8 == 0;  // y itself is freshly allocated, so its rows are then 16-byte aligned
    for (int at = thread_id(); at < kRows * kChunks; at += kThreads) {
      const int row = at / kChunks, c = at % kChunks * 8;
      if (r0 + row >= p.rows) break;
      const uint16_t* src = y + row * (kOut + kPad) + c;
      uint16_t* dst = static_cast<uint16_t*>(p.y) + (r0 + row) * p.out + o0 + c;
      if (whole && o0 + c < p.out) store16(dst, load16(src));
      for (int e = 0; !whole && e < 8 && o0 + c + e < p.out; e++) store2(dst + e, load2(src + e));
    }
  }
};

// Many rows of x: tiles that keep the tensor cores fed. Few: small tiles, so that more blocks share the weights' way
// from memory. Loading element by element takes registers, which the wide tile of unaligned inputs gives up.
template <class T, bool kAligned>
using NmForwardWide = NmForward<T, kAligned, 2, 2, 4, kAligned ? 8 : 4>;
template <class T, bool kAligned>
using NmForwardNarrow = NmForward<T, kAligned, 4, 1, 1, 2>;

}  // namespace tilewise::sparse
