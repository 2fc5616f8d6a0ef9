// Pages of fp16 or bf16 for the tensor-core kernel (attention.h): tiles that ldmatrix reads, queries of the same type.
#pragma once
#include "common/paged/cuda/attention.h"
#include "common/paged/cuda/operands.h"

namespace tilewise::paged {

template <class T, int D, int KeyWarps>
struct NumberPages {
  static constexpr int kItem = sizeof(T), kKeyWarps = KeyWarps, kParts = 1, kMinBlocks = 1;
  static constexpr int kWarpKeys = kTileKeys / KeyWarps, kChunks = D / 8;  // 16-byte chunks a row
  using Operand = OperandRows<T, D>;
  struct Stage {
    alignas(128) T k[kTileKeys * D];
    alignas(128) T v[kTileKeys * D];  // the second stage holds the queries first
  };
  using Shared = TwoStages<Stage>;
  using Scores = float[kWarpKeys / 8][4];

  SIMT_DEVICE static int at(int r, int c) { return Operand::at(r, c); }

  SIMT_DEVICE static void copy(Stage& stage, int first, const char* k, const char* v, int64_t k_row, int64_t v_row) {
    const int lane = lane_id(), c = lane % kChunks;
#pragma unroll
    for (int i = 0; i < kGathered * kChunks / kWarp; i++) {
      const int r = (i * kWarp + lane) / kChunks;
      const int64_t k_from = shfl(k_row, r), v_from = shfl(v_row, r);
      const bool real = k_from >= 0;
      cp_async16(stage.k + at(first + r, c), k + (real ? k_from + c * 16 : 0), real);
      cp_async16(stage.v + at(first + r, c), v + (real ? v_from + c * 16 : 0), real);
    }
  }

  template <int Rows>
  SIMT_DEVICE static void start_queries(const AttentionParams& p, const PagedTile& t, Shared& s) {
    for (int i = thread_id(); i < Rows * kChunks; i += kTileThreads) {
      const int r = i / kChunks, c = i % kChunks;
      const bool real = r < t.rows;
      const T* from = static_cast<const T*>(p.q);
      if (real) from += t.offset_of(p.q_strides, r) + c * 8;
      cp_async16(s.stages[1].v + at(r, c), from, real);
    }
  }
  struct Queries {
    uint32_t a[D / 16][4];

    SIMT_DEVICE Queries(const AttentionParams&, const PagedTile&, const Shared& s, int row) {
#pragma unroll
      for (int kk = 0; kk < D / 16; kk++)
        ldmatrix_x4(a[kk], s.stages[1].v + at(row + (lane_id() & 15), kk * 2 + (lane_id() >> 4)));
    }
  };

  // S = Q K^T for this warp's 16 rows.
  SIMT_DEVICE static void scores(Scores& x, const Queries& q, const Stage& stage, int first, float scale) {
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++)
#pragma unroll
      for (int n = 0; n < kWarpKeys / 16; n++) {
        uint32_t b[4];
        Operand::load_keys(b, stage.k, first + n * 16, kk);
        mma_m16n8k16<T>(x[2 * n], q.a[kk], b[0], b[1]);
        mma_m16n8k16<T>(x[2 * n + 1], q.a[kk], b[2], b[3]);
      }
#pragma unroll
    for (int n = 0; n < kWarpKeys / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) x[n][e] *= scale;
  }

  struct Output {
    float acc[D / 8][4] = {};

    SIMT_DEVICE void rescale(int h, float factor) {
#pragma unroll
      for (int d = 0; d < D / 8; d++) {
        acc[d][2 * h] *= factor;
        acc[d][2 * h + 1] *= factor;
      }
    }
    // O += P V
    SIMT_DEVICE void add(const Scores& x, const Stage& stage, int first) {
#pragma unroll
      for (int kk = 0; kk < kWarpKeys / 16; kk++) {
        const uint32_t a[4] = {pack2<T>(x[2 * kk][0], x[2 * kk][1]), pack2<T>(x[2 * kk][2], x[2 * kk][3]),
                               pack2<T>(x[2 * kk + 1][0], x[2 * kk + 1][1]),
                               pack2<T>(x[2 * kk + 1][2], x[2 * kk + 1][3])};
#pragma unroll
        for (int d = 0; d < D / 16; d++) {
          uint32_t b[4];
          Operand::load_values(b, stage.v, first + kk * 16, d);
          mma_m16n8k16<T>(acc[2 * d], a, b[0], b[1]);
          mma_m16n8k16<T>(acc[2 * d + 1], a, b[2], b[3]);
        }
      }
    }
    template <int Rows>
    SIMT_DEVICE void store(float (&to)[Rows][D + 8], int row) {
#pragma unroll
      for (int d = 0; d < D / 8; d++)
#pragma unroll
        for (int h = 0; h < 2; h++)
          store8(&to[row + lane_id() / 4 + h * 8][d * 8 + lane_id() % 4 * 2],
                 uint2{f32_bits(acc[d][2 * h]), f32_bits(acc[d][2 * h + 1])});
    }
  };
};

}  // namespace tilewise::paged
