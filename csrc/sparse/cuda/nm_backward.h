// dx = dy W and dvalues = (dy^T x) at the kept positions, on the dense tensor cores.
#pragma once
#include "sparse/cuda/tiles.h"

namespace tilewise::sparse {

// The warps' part of a 128 x 128 product: 2 x 2 warps, each 64 x 64.
struct Quarter {
  static constexpr int kThreads = 128, kSide = 128;
  static constexpr int kTilesM = 4, kTilesN = 8;
  using Acc = float[kTilesM][kTilesN][4];
  int m, n;  // first row and column of this warp

  SIMT_DEVICE Quarter() : m(warp_id() % 2 * 64), n(warp_id() / 2 * 64) {}
};

// acc += A B over 16 of the depth, A m-major in `a` [depth, 128] if kTransA else [128, depth], B in `b` [depth, 128].
template <class T, bool kTransA, class TileA, class TileB>
SIMT_DEVICE void multiply_16(Quarter w, TileA& a, TileB& b, int step, Quarter::Acc& acc) {
  const int lane = lane_id();
  uint32_t fa[Quarter::kTilesM][4];
#pragma unroll
  for (int i = 0; i < Quarter::kTilesM; i++) {
    const int row = w.m + 16 * i;
    if constexpr (kTransA) {
      ldmatrix_x4_trans(fa[i], a.chunk(16 * step + lane % 8 + lane / 16 * 8, row / 8 + lane / 8 % 2));
    } else {
      ldmatrix_x4(fa[i], a.chunk(row + lane % 16, 2 * step + lane / 16));
    }
  }
#pragma unroll
  for (int j = 0; j < Quarter::kTilesN; j += 2) {
    uint32_t fb[4];
    ldmatrix_x4_trans(fb, b.chunk(16 * step + lane % 16, w.n / 8 + j + lane / 16));
#pragma unroll
    for (int i = 0; i < Quarter::kTilesM; i++) {
      mma_m16n8k16<T>(acc[i][j], fa[i], fb[0], fb[1]);
      mma_m16n8k16<T>(acc[i][j + 1], fa[i], fb[2], fb[3]);
    }
  }
}

// dx [rows, in]: W is decompressed on its way into shared memory.
template <class T, bool kAligned>
struct NmGradInput {
  static constexpr int kThreads = Quarter::kThreads, kMinArch = 800, kSide = Quarter::kSide, kDepth = 32;

  struct Params {
    NmGradInputParams p;
    uint32_t* fault;
  };
  struct Smem {
    Tile<T, kSide, kDepth> dy[2];
    Tile<T, kDepth, kSide> w[2];
  };
  // What a thread carries from global to shared memory: 16 consecutive inputs of two outputs.
  static constexpr int kPieces = kDepth * kSide / 16 / kThreads;
  struct Piece {
    uint32_t values[4];  // 8 kept values
    uint32_t indices;    // 4 nibbles
  };

  SIMT_DEVICE static Piece load_piece(const Params& q, int64_t o, int64_t k) {
    const NmGradInputParams& p = q.p;
    Piece piece = {};
    if (o >= p.out || k >= p.in) return piece;
    const T* values = static_cast<const T*>(p.values) + (o * p.in + k) / 2;
    const uint8_t* indices = p.indices + o * ceil_div(p.in, int64_t{8}) + k / 8;
    const int groups = p.in - k >= 16 ? 4 : int(p.in - k) / 4;
    if constexpr (kAligned) {
      const uint4 v = load16(values);
      piece.values[0] = v.x, piece.values[1] = v.y, piece.values[2] = v.z, piece.values[3] = v.w;
      piece.indices = load2(indices);
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) piece.values[i] = i < groups ? load4(values + 2 * i) : 0;
      piece.indices = indices[0] | (groups > 2 ? uint32_t(indices[1]) << 8 : 0);
    }
    const uint32_t inside = groups == 4 ? 0xffffu : (1u << 4 * groups) - 1;
    if (illegal_nibbles(piece.indices) & inside) *q.fault = kBadSparseIndex;
    return piece;
  }

  SIMT_DEVICE static void load_pieces(const Params& q, Piece (&pieces)[kPieces], int64_t o0, int64_t k0) {
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      const int at = i * kThreads + thread_id();
      pieces[i] = load_piece(q, o0 + at / (kSide / 16), k0 + at % (kSide / 16) * 16);
    }
  }

  // Two kept values, placed by their positions among four.
  SIMT_DEVICE static uint2 place(uint32_t two, uint32_t nibble) {
    const uint32_t legal_nibble = legalized(nibble, illegal_nibbles(nibble) & 4);
    const Kept kept = kept_of(legal_nibble);
    const uint64_t four = uint64_t{two & 0xffff} << 16 * kept.first | uint64_t{two >> 16} << 16 * kept.second;
    return make_uint2(uint32_t(four), uint32_t(four >> 32));
  }

  SIMT_DEVICE static void store_pieces(Tile<T, kDepth, kSide>& w, const Piece (&pieces)[kPieces]) {
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      const int at = i * kThreads + thread_id(), row = at / (kSide / 16), c = at % (kSide / 16) * 2;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const uint2 a = place(pieces[i].values[2 * h], pieces[i].indices >> 8 * h & 15);
        const uint2 b = place(pieces[i].values[2 * h + 1], pieces[i].indices >> (8 * h + 4) & 15);
        store16(w.chunk(row, c + h), make_uint4(a.x, a.y, b.x, b.y));
      }
    }
  }

  SIMT_DEVICE static void load_dy(const NmGradInputParams& p, Tile<T, kSide, kDepth>& tile, int64_t r0, int64_t o0) {
    const T* dy = static_cast<const T*>(p.dy) + r0 * p.dy_stride + o0;
    load_tile<kAligned, kThreads>(tile, dy, p.dy_stride, p.rows - r0, p.out - o0);
  }

  SIMT_DEVICE static void run(const Params& q, Smem& s) {
    const NmGradInputParams& p = q.p;
    const int64_t k0 = int64_t{block_idx().x} * kSide, r0 = int64_t{block_idx().y} * kSide;
    const int tiles = int(ceil_div(p.out, int64_t{kDepth}));
    const Quarter quarter;
    Quarter::Acc acc = {};
    Piece pieces[kPieces];
    load_dy(p, s.dy[0], r0, 0);
    cp_async_commit();
    load_pieces(q, pieces, 0, k0);
    store_pieces(s.w[0], pieces);
    for (int t = 0; t < tiles; t++) {
      cp_async_wait<0>();
      sync_block();  // tile t is complete, and nobody reads tile t - 1 any more
      const int64_t next = int64_t{t + 1} * kDepth;
      if (next < p.out) load_dy(p, s.dy[(t + 1) % 2], r0, next);
      cp_async_commit();
      load_pieces(q, pieces, next, k0);
#pragma unroll
      for (int step = 0; step < kDepth / 16; step++) multiply_16<T, false>(quarter, s.dy[t % 2], s.w[t % 2], step, acc);
      store_pieces(s.w[(t + 1) % 2], pieces);
    }
    write_dx(p, quarter, acc, r0, k0);
  }

  SIMT_DEVICE static void write_dx(const NmGradInputParams& p, Quarter w, const Quarter::Acc& acc, int64_t r0,
                                   int64_t k0) {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int i = 0; i < Quarter::kTilesM; i++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int64_t row = r0 + w.m + 16 * i + 8 * h + g;
#pragma unroll
        for (int j = 0; j < Quarter::kTilesN; j++) {
          const int64_t k = k0 + w.n + 8 * j + 2 * t;  // in is a multiple of 4: pairs are whole and aligned
          if (row < p.rows && k < p.in)
            store4(static_cast<T*>(p.dx) + row * p.in + k, pack2<T>(acc[i][j][2 * h], acc[i][j][2 * h + 1]));
        }
      }
    }
  }
};

// dvalues [out, in / 2]: the dense product's tile, of which each pair of lanes picks two of four.
template <class T, bool kAligned>
struct NmGradValues {
  static constexpr int kThreads = Quarter::kThreads, kMinArch = 800, kSide = Quarter::kSide, kDepth = 32, kStages = 3;

  struct Params {
    NmGradValuesParams p;
    uint32_t* fault;
  };
  struct Stage {
    Tile<T, kDepth, kSide> dy, x;
  };
  struct Smem {
    Stage stages[kStages];
  };

  SIMT_DEVICE static void load_stage(const NmGradValuesParams& p, Stage& s, int64_t o0, int64_t k0, int64_t r) {
    const T* dy = static_cast<const T*>(p.dy) + r * p.dy_stride + o0;
    const T* x = static_cast<const T*>(p.x) + r * p.x_stride + k0;
    load_tile<kAligned, kThreads>(s.dy, dy, p.dy_stride, p.rows - r, p.out - o0);
    load_tile<kAligned, kThreads>(s.x, x, p.x_stride, p.rows - r, p.in - k0);
  }

  SIMT_DEVICE static void run(const Params& q, Smem& smem) {
    const NmGradValuesParams& p = q.p;
    const int64_t k0 = int64_t{block_idx().x} * kSide, o0 = int64_t{block_idx().y} * kSide;
    const int tiles = int(ceil_div(p.rows, int64_t{kDepth}));
    const Quarter quarter;
    Quarter::Acc acc = {};
#pragma unroll
    for (int t = 0; t < kStages - 1; t++) {
      if (t < tiles) load_stage(p, smem.stages[t], o0, k0, int64_t{t} * kDepth);
      cp_async_commit();
    }
    for (int t = 0; t < tiles; t++) {
      cp_async_wait<kStages - 2>();
      sync_block();  // tile t has landed, and nobody reads tile t - 1 any more
      const int next = t + kStages - 1;
      if (next < tiles) load_stage(p, smem.stages[next % kStages], o0, k0, int64_t{next} * kDepth);
      cp_async_commit();
      Stage& s = smem.stages[t % kStages];
#pragma unroll
      for (int step = 0; step < kDepth / 16; step++) multiply_16<T, true>(quarter, s.dy, s.x, step, acc);
    }
    write_kept(q, quarter, acc, o0, k0);
  }

  // Lanes 2 u and 2 u + 1 hold the four products of a group; the even one gathers and writes its two kept values.
  SIMT_DEVICE static void write_kept(const Params& q, Quarter w, const Quarter::Acc& acc, int64_t o0, int64_t k0) {
    const NmGradValuesParams& p = q.p;
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int i = 0; i < Quarter::kTilesM; i++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int64_t o = o0 + w.m + 16 * i + 8 * h + g;
#pragma unroll
        for (int j = 0; j < Quarter::kTilesN; j++) {
          const float mine[2] = {acc[i][j][2 * h], acc[i][j][2 * h + 1]};
          const float theirs[2] = {shfl_xor(mine[0], 1), shfl_xor(mine[1], 1)};
          const int64_t k = k0 + w.n + 8 * j + 2 * t;
          if (t % 2 || o >= p.out || k >= p.in) continue;
          const uint32_t nibble = uint32_t(p.indices[o * ceil_div(p.in, int64_t{8}) + k / 8]) >> k % 8 & 15;
          const Kept kept = kept_of(nibble);
          if (!legal(kept)) *q.fault = kBadSparseIndex;
          const auto pick = [&](int at) {
            return at == 0 ? mine[0] : at == 1 ? mine[1] : at == 2 ? theirs[0] : theirs[1];
          };
          store4(static_cast<T*>(p.dvalues) + (o * p.in + k) / 2, pack2<T>(pick(kept.first), pick(kept.second)));
        }
      }
    }
  }
};

}  // namespace tilewise::sparse
