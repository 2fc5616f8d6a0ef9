// The three products in fp32, without tensor cores: tiles in shared memory, 4 x 4 sums per thread, plain FMA.
#pragma once
#include "sparse/cuda/tiles.h"

namespace tilewise::sparse {

// The weight at (o, k), zero where nothing is kept.
SIMT_DEVICE float weight_at(const float* values, const uint8_t* indices, int64_t in, int64_t o, int64_t k,
                            uint32_t* fault) {
  const uint32_t nibble = uint32_t(indices[o * ceil_div(in, int64_t{8}) + k / 8]) >> (k / 4 % 2 * 4) & 15;
  const Kept kept = kept_of(nibble);
  if (!legal(kept)) *fault = kBadSparseIndex;
  const float* pair = values + (o * in + k / 4 * 4) / 2;
  const int at = int(k % 4);
  return at == kept.first ? pair[0] : at == kept.second ? pair[1] : 0.f;
}

// Each operation is a product C[m, n] = sum over d of left(m, d) right(n, d); four consecutive n are stored at once.
struct FloatForward {
  NmForwardParams p;
  uint32_t* fault;
  SIMT_HD int64_t rows() const { return p.rows; }
  SIMT_HD int64_t cols() const { return p.out; }
  SIMT_DEVICE int64_t depth() const { return p.in; }
  SIMT_DEVICE float left(int64_t m, int64_t d) const { return static_cast<const float*>(p.x)[m * p.x_stride + d]; }
  SIMT_DEVICE float right(int64_t n, int64_t d) const {
    return weight_at(static_cast<const float*>(p.values), p.indices, p.in, n, d, fault);
  }
  SIMT_DEVICE void store(int64_t m, int64_t n, const float (&c)[4]) const {
    for (int i = 0; i < 4; i++)
      if (n + i < p.out)
        static_cast<float*>(p.y)[m * p.out + n + i] = c[i] + (p.bias ? static_cast<const float*>(p.bias)[n + i] : 0.f);
  }
};

struct FloatGradInput {
  NmGradInputParams p;
  uint32_t* fault;
  SIMT_HD int64_t rows() const { return p.rows; }
  SIMT_HD int64_t cols() const { return p.in; }
  SIMT_DEVICE int64_t depth() const { return p.out; }
  SIMT_DEVICE float left(int64_t m, int64_t d) const { return static_cast<const float*>(p.dy)[m * p.dy_stride + d]; }
  SIMT_DEVICE float right(int64_t n, int64_t d) const {
    return weight_at(static_cast<const float*>(p.values), p.indices, p.in, d, n, fault);
  }
  SIMT_DEVICE void store(int64_t m, int64_t n, const float (&c)[4]) const {
    for (int i = 0; i < 4; i++) static_cast<float*>(p.dx)[m * p.in + n + i] = c[i];
  }
};

struct FloatGradValues {
  NmGradValuesParams p;
  uint32_t* fault;
  SIMT_HD int64_t rows() const { return p.out; }
  SIMT_HD int64_t cols() const { return p.in; }
  SIMT_DEVICE int64_t depth() const { return p.rows; }
  SIMT_DEVICE float left(int64_t m, int64_t d) const { return static_cast<const float*>(p.dy)[d * p.dy_stride + m]; }
  SIMT_DEVICE float right(int64_t n, int64_t d) const { return static_cast<const float*>(p.x)[d * p.x_stride + n]; }
  SIMT_DEVICE void store(int64_t m, int64_t n, const float (&c)[4]) const {
    const uint32_t byte = p.indices[m * ceil_div(p.in, int64_t{8}) + n / 8];
    const Kept kept = kept_of(byte >> (n / 4 % 2 * 4) & 15);
    if (!legal(kept)) *fault = kBadSparseIndex;
    float* pair = static_cast<float*>(p.dvalues) + (m * p.in + n) / 2;
    const auto pick = [&](int at) { return at == 0 ? c[0] : at == 1 ? c[1] : at == 2 ? c[2] : c[3]; };
    pair[0] = pick(kept.first);
    pair[1] = pick(kept.second);
  }
};

template <class Operation>
struct FloatProduct {
  static constexpr int kThreads = 256, kMinArch = 800, kSide = 64, kDepth = 16, kPad = 4;
  using Params = Operation;
  struct Smem {
    alignas(16) float left[kDepth][kSide + kPad];
    alignas(16) float right[kDepth][kSide + kPad];
  };

  SIMT_DEVICE static void load(const Params& p, Smem& s, int64_t m0, int64_t n0, int64_t d0) {
#pragma unroll
    for (int i = 0; i < kSide * kDepth / kThreads; i++) {
      const int at = i * kThreads + thread_id(), d = at % kDepth, side = at / kDepth;
      const bool deep = d0 + d < p.depth();
      s.left[d][side] = deep && m0 + side < p.rows() ? p.left(m0 + side, d0 + d) : 0.f;
      s.right[d][side] = deep && n0 + side < p.cols() ? p.right(n0 + side, d0 + d) : 0.f;
    }
  }

  SIMT_DEVICE static void run(const Params& p, Smem& s) {
    const int64_t n0 = int64_t{block_idx().x} * kSide, m0 = int64_t{block_idx().y} * kSide;
    const int m = thread_id() / 16 * 4, n = thread_id() % 16 * 4;
    float acc[4][4] = {};
    for (int64_t d0 = 0; d0 < p.depth(); d0 += kDepth) {
      load(p, s, m0, n0, d0);
      sync_block();
      float part[4][4] = {};  // two levels, for accuracy: rounding grows with kDepth + depth / kDepth
#pragma unroll
      for (int d = 0; d < kDepth; d++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
          for (int j = 0; j < 4; j++) part[i][j] += s.left[d][m + i] * s.right[d][n + j];
        }
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) acc[i][j] += part[i][j];
      }
      sync_block();
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (m0 + m + i < p.rows() && n0 + n < p.cols()) p.store(m0 + m + i, n0 + n, acc[i]);
  }
};

// total [out] = the sum of the rows of dy: a warp per 32 columns and 1 / kWarps of the rows.
template <class T>
struct ColumnSum {
  static constexpr int kWarps = 8, kThreads = 32 * kWarps, kMinArch = 800;
  using Params = ColumnSumParams;
  struct Smem {
    float parts[kWarps][32];
  };

  SIMT_DEVICE static float value(T v) {
    if constexpr (is_same_v<T, float>)
      return v;
    else
      return to_f32(v);
  }

  SIMT_DEVICE static void run(const Params& p, Smem& s) {
    const int64_t o = int64_t{block_idx().x} * 32 + lane_id();
    const T* dy = static_cast<const T*>(p.dy) + o;
    float total = 0;
    for (int64_t first = 0; first < p.rows; first += 32 * kWarps) {  // two levels, for accuracy
      float part = 0;
      const int64_t end = first + 32 * kWarps < p.rows ? first + 32 * kWarps : p.rows;
      for (int64_t r = first + warp_id(); o < p.out && r < end; r += kWarps) part += value(dy[r * p.dy_stride]);
      total += part;
    }
    s.parts[warp_id()][lane_id()] = total;
    sync_block();
    if (warp_id() || o >= p.out) return;
    total = 0;
    for (int w = 0; w < kWarps; w++) total += s.parts[w][lane_id()];
    if constexpr (is_same_v<T, float>)
      static_cast<float*>(p.total)[o] = total;
    else
      static_cast<T*>(p.total)[o] = from_f32<T>(total);
  }
};

}  // namespace tilewise::sparse
