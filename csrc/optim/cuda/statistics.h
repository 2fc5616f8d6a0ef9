// What rank-1 and factored second moments need before their step: the largest new v, or the mean of g^2, of every row
// and column. A thread block reduces a tile, others add the tiles' partial results, in an order that does not depend on
// the schedule: no atomics. After the step the new scales take the old ones' place.
#pragma once
#include "optim/cuda/codec.h"
#include "optim/cuda/master.h"
#include "optim/cuda/rule.h"
#include "optim/cuda/structure.h"

namespace tilewise::optim {

SIMT_DEVICE float folded(float a, float b, bool maximum) {
  return maximum ? fmaxf(a, b) : a + b;
}

// A tile: each thread takes four columns and walks down the rows.
struct TileStatistics {
  static constexpr int kThreads = kTileColumns / 4, kMinBlocks = 4, kMinArch = 800, kWarps = kThreads / kWarp;
  using Params = TensorTable;
  struct Smem {
    float rows[kWarps][kTileRows];
  };
  using Run = float[4];

  SIMT_DEVICE static void run(const Params& q, Smem& s) {
    if (skipped(q.c.device)) return;
    const int unit = static_cast<int>(block_idx().x);
    const Entry& t = q.tensor_of(unit);
    const int64_t tile = unit - t.first_unit, column_tiles = ceil_div<int64_t>(t.columns, kTileColumns);
    const int64_t row_tile = tile / column_tiles, column_tile = tile % column_tiles;
    const int64_t column = column_tile * kTileColumns + 4 * thread_id(), first_row = row_tile * kTileRows;
    const bool maximum = t.second_format == Format::rank1;
    const float grad_factor = grad_factor_of(q.c);
    const int rows = static_cast<int>(t.rows - first_row < kTileRows ? t.rows - first_row : kTileRows);
    Run columns = {};
    for (int r = 0; r < rows; r++) {
      Run x = {};
      if (column < t.columns) squares(x, q.c, t, grad_factor, first_row + r, column);
      float row = 0;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        row = folded(row, x[i], maximum);
        columns[i] = folded(columns[i], x[i], maximum);
      }
#pragma unroll
      for (int offset = kWarp / 2; offset > 0; offset /= 2) row = folded(row, shfl_xor(row, offset), maximum);
      if (lane_id() == 0) s.rows[warp_id()][r] = row;
    }
    sync_block();
    const Workspace work(t);
    for (int i = 0; i < 4; i++)
      if (column + i < t.columns) work.column_partials[row_tile * t.columns + column + i] = columns[i];
    if (thread_id() < rows) work.row_partials[column_tile * t.rows + first_row + thread_id()] = row_total(s, maximum);
  }
  static_assert(kThreads == kTileRows, "a thread finishes one row");

  SIMT_DEVICE static float row_total(const Smem& s, bool maximum) {
    float total = s.rows[0][thread_id()];
#pragma unroll
    for (int w = 1; w < kWarps; w++) total = folded(total, s.rows[w][thread_id()], maximum);
    return total;
  }

  // Four elements of a row: their new v, or g^2; zero where that is not finite and beyond the row's end.
  SIMT_DEVICE static void squares(Run& x, const CallConstants& c, const Entry& t, float grad_factor, int64_t row,
                                  int64_t column) {
    const int64_t at = row * t.columns + column, end = (row + 1) * t.columns;
    const bool aligned = t.aligned && t.columns % 4 == 0;
    Run g;
    load_grad(g, t, at, end, aligned);
    if (c.l2 != 0) {
      Run p;
      load_param(p, t, at, end, aligned);
#pragma unroll
      for (int i = 0; i < 4; i++) g[i] = gradient(g[i], p[i], grad_factor, c.l2);
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) g[i] = gradient(g[i], 0, grad_factor, 0);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (column + i >= t.columns) continue;
      const float square =
          t.second_format == Format::rank1 ? next_of(t, c, row, column + i, at + i, g[i]) : g[i] * g[i];
      x[i] = square < INFINITY ? square : 0;
    }
  }

  SIMT_DEVICE static float next_of(const Entry& t, const CallConstants& c, int64_t row, int64_t column, int64_t at,
                                   float g) {
    // csrc/optim/params.h: bits 8k + 4h of word j hold element 64h + 16k + j of a block
    const int e = static_cast<int>(at % kBlock), h = e / 64, k = e % 64 / 16, j = e % 16;
    const uint8_t pair = static_cast<const uint8_t*>(t.second)[at / kBlock * kCodeBytes + 4 * j + k];
    const float scale = rank1_scale(t.second_scales[row], t.second_scales[t.rows + column]);
    return next_square(unsigned_value(pair >> 4 * h & 15) * kFourthPowerUnit * scale, g, c);
  }

  SIMT_DEVICE static void load_param(Run& p, const Entry& t, int64_t at, int64_t end, bool aligned) {
    switch (t.param_type) {
      case Float::f32: return load_master<float>(p, t, at, end, aligned);
      case Float::bf16: return load_master<bf16>(p, t, at, end, aligned);
      case Float::f16: return load_master<fp16>(p, t, at, end, aligned);
    }
  }
};

// A unit adds up the partial results of as many rows, or of as many columns, as a warp has lanes: a lane's tiles are
// shared out among the warps. Rank-1: the new scales, in the workspace. Factored: the moving averages, in place.
struct CombineStatistics {
  static constexpr int kThreads = 256, kMinArch = 800, kWarps = kThreads / kWarp;
  using Params = TensorTable;
  struct Smem {
    float totals[kWarps][kWarp];
  };

  // Of rows, or of columns: partial results [tiles, count], each of `size` elements in all; where the first one's
  // result stands among rows + columns.
  struct Side {
    const float* partials;
    int64_t tiles, count, size, offset;
  };

  SIMT_HD static int64_t units(int64_t rows, int64_t columns) {
    return ceil_div<int64_t>(rows, kWarp) + ceil_div<int64_t>(columns, kWarp);
  }

  SIMT_DEVICE static void run(const Params& q, Smem& s) {
    if (skipped(q.c.device)) return;
    const int unit = static_cast<int>(block_idx().x);
    const Entry& t = q.tensor_of(unit);
    const Workspace work(t);
    const int64_t of_tensor = unit - t.first_unit, row_units = ceil_div<int64_t>(t.rows, kWarp);
    const bool is_column = of_tensor >= row_units;
    const Side rows = {work.row_partials, ceil_div<int64_t>(t.columns, kTileColumns), t.rows, t.columns, 0};
    const Side columns = {work.column_partials, ceil_div<int64_t>(t.rows, kTileRows), t.columns, t.rows, t.rows};
    const Side side = is_column ? columns : rows;
    const int64_t i = (of_tensor - (is_column ? row_units : 0)) * kWarp + lane_id();
    const bool maximum = t.second_format == Format::rank1;
    s.totals[warp_id()][lane_id()] = i < side.count ? share(side, i, maximum) : 0;
    sync_block();
    if (warp_id() > 0 || i >= side.count) return;
    float total = s.totals[0][lane_id()];
#pragma unroll
    for (int w = 1; w < kWarps; w++) total = folded(total, s.totals[w][lane_id()], maximum);
    if (maximum)
      work.scales[side.offset + i] = total;
    else
      average(t.second_scales[side.offset + i], total / static_cast<float>(side.size), q.c);
  }

  // This warp's share of one row's or column's tiles.
  SIMT_DEVICE static float share(const Side& side, int64_t i, bool maximum) {
    float total = 0;
#pragma unroll 8
    for (int64_t tile = warp_id(); tile < side.tiles; tile += kWarps)
      total = folded(total, side.partials[tile * side.count + i], maximum);
    return total;
  }

  SIMT_DEVICE static void average(float& held, float mean, const CallConstants& c) {
    held = fmaf(mean < INFINITY ? mean : 0, c.square_weight, held * c.beta2);
  }
};

// After it, for factored moments: 1 / mean(row). One thread block per tensor.
struct InvertMean {
  static constexpr int kThreads = 1024, kMinArch = 800, kWarps = kThreads / kWarp;
  using Params = TensorTable;
  struct Smem {
    float totals[kWarps];
  };

  SIMT_DEVICE static void run(const Params& q, Smem& s) {
    if (skipped(q.c.device)) return;
    const Entry& t = q.tensors[block_idx().x];
    float sum = 0;
#pragma unroll 8
    for (int64_t i = thread_id(); i < t.rows; i += kThreads) sum += t.second_scales[i];
    sum = warp_sum(sum);
    if (lane_id() == 0) s.totals[warp_id()] = sum;
    sync_block();
    if (thread_id() != 0) return;
    for (int w = 1; w < kWarps; w++) sum += s.totals[w];
    *Workspace(t).inverse_mean(t) = 1 / fmaxf(sum / static_cast<float>(t.rows), 0x1p-126f);
  }
};

// After the step, for rank-1 moments: a thread moves one scale.
struct PublishScales {
  static constexpr int kThreads = 256, kMinArch = 800;
  using Params = TensorTable;
  struct Smem {};

  SIMT_HD static int64_t units(int64_t rows, int64_t columns) { return ceil_div<int64_t>(rows + columns, kThreads); }

  SIMT_DEVICE static void run(const Params& q, Smem&) {
    if (skipped(q.c.device)) return;
    const int unit = static_cast<int>(block_idx().x);
    const Entry& t = q.tensor_of(unit);
    const int64_t i = static_cast<int64_t>(unit - t.first_unit) * kThreads + thread_id();
    if (i < t.rows + t.columns) t.second_scales[i] = Workspace(t).scales[i];
  }
};

}  // namespace tilewise::optim
