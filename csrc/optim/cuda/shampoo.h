// The pieces of Shampoo on the GPU: 4-bit codes of matrices (layout and code book: params.h), and the Bjorck step.
#pragma once
#include "optim/cuda/codec.h"
#include "optim/cuda/quantize.h"

namespace tilewise::optim {

// ---- codes: four lanes hold a block of 64 elements, 16 each, in runs of four ----
constexpr int kLanesPerRowBlock = 4, kRuns = 4;

struct MatrixCodecLaunch {
  MatrixCodecParams p;
  bool aligned;  // rows, to 16 bytes
};

// The place of this lane: which block of which row, and the runs of four elements that it holds.
struct RowLane {
  int64_t row, block;  // of all rows, of all blocks
  int part, column, diagonal;

  SIMT_DEVICE explicit RowLane(const MatrixCodecParams& p) {
    const int order = static_cast<int>(p.order), blocks = ceil_div(order, kRowBlock);
    const int64_t lane = static_cast<int64_t>(block_idx().x) * kCodecThreads + thread_id();
    part = thread_id() % kLanesPerRowBlock;
    block = lane / kLanesPerRowBlock;
    row = block / blocks;
    column = static_cast<int>(block % blocks) * kRowBlock + 4 * part;
    diagonal = static_cast<int>(row % order);
  }
  SIMT_DEVICE int run(int i) const { return column + 16 * i; }
  SIMT_DEVICE bool on_diagonal(int i) const { return diagonal >= run(i) && diagonal < run(i) + 4; }
};

struct SquareCodec {
  float thresholds[8], first_negative;

  SIMT_DEVICE explicit SquareCodec(float scale) {
    constexpr Magnitudes book = kSquares;
#pragma unroll
    for (int i = 0; i < 8; i++) thresholds[i] = product_down(book.midpoint[i], scale);
    first_negative = product_down(kNegativeMidpoint, scale);
  }
  // Nearest, a tie to the smaller magnitude.
  SIMT_DEVICE uint32_t encode(float x) const {
    const float a = fabsf(x);
    int magnitude = a > (x < 0 ? first_negative : thresholds[0]);
    magnitude += x >= 0 && a > thresholds[1];
#pragma unroll
    for (int i = 2; i < 8; i++) magnitude += a > thresholds[i];
    return x < 0 ? 7 - magnitude : 7 + magnitude;
  }
};

struct EncodeMatrix {
  static constexpr int kThreads = kCodecThreads, kMinArch = 800;
  using Params = MatrixCodecLaunch;
  struct Smem {};

  SIMT_DEVICE static void run(const Params& q, Smem&) {
    const RowLane lane(q.p);
    const bool valid = lane.row < q.p.batch * q.p.order;
    float x[kRuns][4] = {};
    if (valid) load(x, lane, q);
    float top = 0;
#pragma unroll
    for (int i = 0; i < kRuns; i++) {
#pragma unroll
      for (int e = 0; e < 4; e++) top = fmaxf(top, fabsf(x[i][e]));
    }
    const float scale = signed_scale(top);
    const SquareCodec codec(scale);
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < kRuns; i++) {
#pragma unroll
      for (int e = 0; e < 4; e++) words[e] |= codec.encode(x[i][e]) << 4 * i;
    }
    if (!valid) return;
    store8(q.p.codes + lane.block * kRowBlockBytes + 8 * lane.part,
           make_uint2(words[0] | words[1] << 16, words[2] | words[3] << 16));
    if (lane.part == 0) q.p.scales[lane.block] = scale;
  }

  // Values that are not finite count as zero, and so does the diagonal where it is kept apart.
  SIMT_DEVICE static void load(float (&x)[kRuns][4], const RowLane& lane, const Params& q) {
    const float* values = q.p.values + lane.row * q.p.order;
#pragma unroll
    for (int i = 0; i < kRuns; i++) {
      load_run(x[i], values, lane.run(i), q.p.order, q.aligned);
      const bool apart = q.p.diagonal && lane.on_diagonal(i);
      if (apart) q.p.diagonal[lane.row] = values[lane.diagonal];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const bool usable = fabsf(x[i][e]) < INFINITY && !(apart && lane.run(i) + e == lane.diagonal);
        x[i][e] = usable ? x[i][e] : 0;
      }
    }
  }
};

// The values of the codes, for look-ups in shared memory.
SIMT_DEVICE float square_value(int code) {
  constexpr Magnitudes book = kSquares;
  float value = 0;
#pragma unroll
  for (int i = 1; i < 9; i++) {
    if (code == 7 + i) value = book.value[i];
    if (i > 1 && code == 8 - i) value = -book.value[i];
  }
  return value;
}

struct DecodeMatrix {
  static constexpr int kThreads = kCodecThreads, kMinArch = 800;
  using Params = MatrixCodecLaunch;
  struct Smem {
    float values[16];
  };

  SIMT_DEVICE static void run(const Params& q, Smem& s) {
    if (thread_id() < 16) s.values[thread_id()] = square_value(thread_id());
    sync_block();
    const RowLane lane(q.p);
    if (lane.row >= q.p.batch * q.p.order) return;
    const float scale = q.p.scales[lane.block];
    const uint2 codes = load8(q.p.codes + lane.block * kRowBlockBytes + 8 * lane.part);
    const uint32_t words[4] = {codes.x & 0xffff, codes.x >> 16, codes.y & 0xffff, codes.y >> 16};
    float* values = q.p.values + lane.row * q.p.order;
#pragma unroll
    for (int i = 0; i < kRuns; i++) {
      const bool apart = q.p.diagonal && lane.on_diagonal(i);
      const float kept = apart ? q.p.diagonal[lane.row] : 0;
      float x[4];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        x[e] = s.values[words[e] >> 4 * i & 15] * scale;
        if (apart && lane.run(i) + e == lane.diagonal) x[e] = kept;
      }
      store_run(x, values, lane.run(i), q.p.order, q.aligned);
    }
  }
};

// ---- the Bjorck step: defect = I - rows rows^T, then out = rows + 0.5 defect rows ----
// The defect is small, and so are the roundings of the second product; with the Gram matrix they are many times as
// large. A block of 64 threads makes a tile of 64 x 64, a thread 8 x 8 of it: rows 4 (thread / 8) .. + 3 and the same
// 32 further down, columns 4 (thread % 8) .. + 3 and the same 32 further on. Tiles of both factors stand in shared
// memory twice, [depth][side]: while one is multiplied, the next arrives through registers.
constexpr int kTile = 64;

struct SquareLaunch {
  OrthonormalizeParams p;
  bool aligned;  // all rows of all matrices, to 16 bytes
  int side;      // tiles across a matrix
};

template <bool kDefect>
struct SquareProduct {
  static constexpr int kThreads = 64, kMinArch = 800, kMinBlocks = 6, kDepth = 8, kPitch = kTile + 4;
  using Params = SquareLaunch;
  struct Smem {
    alignas(16) float left[2][kDepth][kPitch], right[2][kDepth][kPitch];
  };
  using Fetched = float[2][4];  // a thread's share of a tile of kDepth x 64
  using Sums = float[8][8];

  // Four consecutive values of a matrix; beyond its edges zeros.
  SIMT_DEVICE static void fetch4(float (&x)[4], const float* matrix, int row, int column, const Params& q) {
    const int order = static_cast<int>(q.p.order);
    const float* source = matrix + static_cast<int64_t>(row) * order + column;
    if (q.aligned && row < order && column < order) {
      const uint4 v = load16(source);
      x[0] = bits_f32(v.x), x[1] = bits_f32(v.y), x[2] = bits_f32(v.z), x[3] = bits_f32(v.w);
      return;
    }
#pragma unroll
    for (int e = 0; e < 4; e++) x[e] = row < order && column + e < order ? source[e] : 0;
  }

  // Rows row .. row + 63 at depth k .. k + 7: two neighbouring lanes read 32 consecutive bytes.
  SIMT_DEVICE static void fetch_rows(Fetched& x, const float* matrix, int row, int k, const Params& q) {
#pragma unroll
    for (int i = 0; i < 2; i++) fetch4(x[i], matrix, row + thread_id() / 2 + 32 * i, k + thread_id() % 2 * 4, q);
  }
  SIMT_DEVICE static void keep_rows(float (&tile)[kDepth][kPitch], const Fetched& x) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int e = 0; e < 4; e++) tile[thread_id() % 2 * 4 + e][thread_id() / 2 + 32 * i] = x[i][e];
    }
  }
  // Columns column .. column + 63 of rows k .. k + 7.
  SIMT_DEVICE static void fetch_columns(Fetched& x, const float* matrix, int k, int column, const Params& q) {
#pragma unroll
    for (int i = 0; i < 2; i++) fetch4(x[i], matrix, k + thread_id() / 16 + 4 * i, column + thread_id() % 16 * 4, q);
  }
  SIMT_DEVICE static void keep_columns(float (&tile)[kDepth][kPitch], const Fetched& x) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float* row = tile[thread_id() / 16 + 4 * i] + thread_id() % 16 * 4;
      store16(row, make_uint4(f32_bits(x[i][0]), f32_bits(x[i][1]), f32_bits(x[i][2]), f32_bits(x[i][3])));
    }
  }

  SIMT_DEVICE static void read8(float (&x)[8], const float* row) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint4 v = load16(row + 32 * half);
      x[4 * half] = bits_f32(v.x), x[4 * half + 1] = bits_f32(v.y);
      x[4 * half + 2] = bits_f32(v.z), x[4 * half + 3] = bits_f32(v.w);
    }
  }
  SIMT_DEVICE static void multiply(Sums& sums, const Smem& s, int stage) {
#pragma unroll
    for (int k = 0; k < kDepth; k++) {
      float a[8], b[8];
      read8(a, s.left[stage][k] + thread_id() / 8 * 4);
      read8(b, s.right[stage][k] + thread_id() % 8 * 4);
#pragma unroll
      for (int i = 0; i < 8; i++) {
#pragma unroll
        for (int j = 0; j < 8; j++) sums[i][j] = fmaf(a[i], b[j], sums[i][j]);
      }
    }
  }

  SIMT_DEVICE static void run(const Params& q, Smem& s) {
    const int tiles = q.side * q.side, order = static_cast<int>(q.p.order);
    const int tile = static_cast<int>(block_idx().x % tiles), m0 = tile / q.side * kTile, n0 = tile % q.side * kTile;
    if (kDefect && m0 > n0) return;  // the block of the mirrored tile writes this one
    const int64_t at = static_cast<int64_t>(block_idx().x / tiles) * order * order;
    const float *rows = q.p.rows + at, *left = kDefect ? rows : q.p.defect + at;
    Sums sums = {};
    Fetched a, b;
    const auto fetch = [&](int k) {
      fetch_rows(a, left, m0, k, q);
      if constexpr (kDefect)
        fetch_rows(b, rows, n0, k, q);
      else
        fetch_columns(b, rows, k, n0, q);
    };
    const auto keep = [&](int stage) {
      keep_rows(s.left[stage], a);
      if constexpr (kDefect)
        keep_rows(s.right[stage], b);
      else
        keep_columns(s.right[stage], b);
    };
    fetch(0);
    keep(0);
    for (int k = 0, stage = 0; k < order; k += kDepth, stage ^= 1) {
      sync_block();  // this stage is filled, and the other has been read
      if (k + kDepth < order) fetch(k + kDepth);
      multiply(sums, s, stage);
      if (k + kDepth < order) keep(stage ^ 1);
    }
    const int m = m0 + thread_id() / 8 * 4, n = n0 + thread_id() % 8 * 4;
    store(sums, q, at, m, n);
    if (kDefect && m0 < n0) mirror(sums, q, at, m, n);
  }

  SIMT_DEVICE static void store4(const float (&x)[4], float* matrix, int row, int column, const Params& q) {
    if (row < q.p.order) store_run(x, matrix + row * q.p.order, column, q.p.order, q.aligned);
  }

  SIMT_DEVICE static void store(const Sums& sums, const Params& q, int64_t at, int m, int n) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int row = m + i % 4 + i / 4 * 32;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int column = n + 32 * half;
        float x[4];
        if constexpr (!kDefect) fetch4(x, q.p.rows + at, row, column, q);
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float sum = sums[i][4 * half + e];
          x[e] = kDefect ? (row == column + e) - sum : fmaf(.5f, sum, x[e]);
        }
        store4(x, (kDefect ? q.p.defect : q.p.out) + at, row, column, q);
      }
    }
  }

  // The transposed tile.
  SIMT_DEVICE static void mirror(const Sums& sums, const Params& q, int64_t at, int m, int n) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float x[4] = {-sums[4 * half][j], -sums[4 * half + 1][j], -sums[4 * half + 2][j], -sums[4 * half + 3][j]};
        store4(x, q.p.defect + at, n + j % 4 + j / 4 * 32, m + 32 * half, q);
      }
    }
  }
};

}  // namespace tilewise::optim
