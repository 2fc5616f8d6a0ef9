// 2:4 backward: dx = dy W, and dvalues, the kept positions of dy^T x.
#pragma once
#include "sparse/cpu/nm_forward.h"

namespace tilewise {
namespace {

// ---- dx ----
// dx^T [in, rows] = W^T dy^T. The four inputs of a group stand in registers as accumulators, and the outputs are
// visited pattern by pattern: within a pattern the two accumulators that a weight row adds to are fixed, so a line of
// dy^T is loaded once for its two products, and both FMA ports stay busy.
constexpr int kGroupVectors = W == 16 ? 4 : 2;
constexpr int64_t kGroupWidth = kGroupVectors * W;
constexpr int64_t kOutBlock = 128;  // outputs per pass: their lines of dy^T take 32 KB
constexpr int kPatterns = 6;
constexpr int64_t kPlanBytes = 4 << 20;

struct PatternWeight {
  float first, second;
};

// One group of inputs over one block of outputs, sorted by pattern.
struct GroupPlan {
  PatternWeight weights[kOutBlock];
  uint32_t lines[kOutBlock];  // offset of the output's line in the panel
  int32_t ends[kPatterns];
};

// The pairs 01 02 03 12 13 23 by their nibble; the host lets no other pass.
constexpr uint8_t kPatternOf[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 3, 0, 0, 2, 4, 5, 0};

constexpr int64_t kGroupSlice = 32;  // groups that one task sorts: their write positions fit the first-level cache

template <class T>
inline void sort_groups(const NmGradInputParams& p, GroupPlan* plans, int64_t o0, int64_t g0, int64_t count) {
  const int64_t outputs = min_of(kOutBlock, p.out - o0), row_bytes = ceil_div(p.in, 8);
  const uint8_t* indices = p.indices + o0 * row_bytes + g0 / 2;  // g0 is even
  const T* values = static_cast<const T*>(p.values) + (o0 * p.in) / 2 + 2 * g0;
  int32_t next[kGroupSlice][8] = {};
  for (int64_t o = 0; o < outputs; o++)
    for (int64_t g = 0; g < count; g++) next[g][kPatternOf[indices[o * row_bytes + g / 2] >> g % 2 * 4 & 15]]++;
  for (int64_t g = 0; g < count; g++) {
    int32_t end = 0;
    for (int i = 0; i < kPatterns; i++) {
      const int32_t begin = end;
      plans[g0 + g].ends[i] = end += next[g][i];
      next[g][i] = begin;
    }
  }
  for (int64_t o = 0; o < outputs; o++) {
    const T* row = values + o * (p.in / 2);
    for (int64_t g = 0; g < count; g++) {
      const int32_t at = next[g][kPatternOf[indices[o * row_bytes + g / 2] >> g % 2 * 4 & 15]]++;
      plans[g0 + g].weights[at] = {to_float(row[2 * g]), to_float(row[2 * g + 1])};
      plans[g0 + g].lines[at] = uint32_t(o * kGroupWidth);
    }
  }
}

template <int First, int Second>
TILEWISE_INLINE void add_pattern(VF (&acc)[4][kGroupVectors], const GroupPlan& plan, int begin, int end,
                                 const float* lines) {
  for (int i = begin; i < end; i++) {
    const VF first = set1(plan.weights[i].first), second = set1(plan.weights[i].second);
    const float* line = lines + plan.lines[i];
#pragma GCC unroll 4
    for (int j = 0; j < kGroupVectors; j++) {
      const VF d = load(line + j * W);
      acc[First][j] += first * d;
      acc[Second][j] += second * d;
    }
  }
}

// dx [4, width] of one group += one block of outputs, which is summed from zero: short chains of roundings.
inline void add_group(float* dx, const GroupPlan& plan, const float* lines, bool fresh) {
  VF acc[4][kGroupVectors] = {};
  add_pattern<0, 1>(acc, plan, 0, plan.ends[0], lines);
  add_pattern<0, 2>(acc, plan, plan.ends[0], plan.ends[1], lines);
  add_pattern<0, 3>(acc, plan, plan.ends[1], plan.ends[2], lines);
  add_pattern<1, 2>(acc, plan, plan.ends[2], plan.ends[3], lines);
  add_pattern<1, 3>(acc, plan, plan.ends[3], plan.ends[4], lines);
  add_pattern<2, 3>(acc, plan, plan.ends[4], plan.ends[5], lines);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
    for (int j = 0; j < kGroupVectors; j++) {
      float* at = dx + i * kGroupWidth + j * W;
      store(at, fresh ? acc[i][j] : load(at) + acc[i][j]);
    }
}

template <class T>
const char* nm_grad_input_many(const NmGradInputParams& p, const Runtime& rt) {
  const int64_t groups = p.in / 4, slices = ceil_div(groups, kGroupSlice), blocks = ceil_div(p.out, kOutBlock);
  // Plans that fit are kept for all chunks; the others are made anew for each, so the chunks had better be large.
  const bool keep = blocks * groups * int64_t(sizeof(GroupPlan)) <= kPlanBytes;
  const Panels panels(rt, p.rows, kGroupWidth, max_of(p.in, p.out), slices, keep ? kHotBytes / 2 : kLargeBytes);
  const int64_t chunk = panels.per_chunk;
  float* dy = scratch<float>(rt, 0, chunk * p.out * kGroupWidth);  // [panel, out, width]
  float* dx = scratch<float>(rt, 1, chunk * p.in * kGroupWidth);   // [panel, in, width]
  GroupPlan* plans = scratch<GroupPlan>(rt, 2, keep ? blocks * groups : groups);
  if (!dy || !dx || !plans) return kOutOfMemory;
  for (int64_t first = 0; first < p.rows; first += chunk * kGroupWidth) {
    pack_panels(rt, panels, dy, static_cast<const T*>(p.dy), p.dy_stride, p.out, first);
    const int64_t count = panels.in_chunk(first);
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t o = block * kOutBlock;
      GroupPlan* plan = plans + (keep ? block * groups : 0);
      if (first == 0 || !keep) {
        parallel_for(rt, slices, 1, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; i++)
            sort_groups<T>(p, plan, o, i * kGroupSlice, min_of(kGroupSlice, groups - i * kGroupSlice));
        });
      }
      parallel_for(rt, count * slices, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          const int64_t panel = i / slices, g0 = i % slices * kGroupSlice;
          const float* lines = dy + (panel * p.out + o) * kGroupWidth;
          for (int64_t g = g0; g < min_of(groups, g0 + kGroupSlice); g++)
            add_group(dx + (panel * p.in + 4 * g) * kGroupWidth, plan[g], lines, o == 0);
        }
      });
    }
    parallel_for(rt, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; panel++) {
        const int64_t row = first + panel * kGroupWidth;
        unpack_panel<T>(static_cast<T*>(p.dx) + row * p.in, p.in, dx + panel * p.in * kGroupWidth, kGroupWidth,
                        panels.valid(row), p.in, nullptr);
      }
    });
  }
  return nullptr;
}

// Few rows: sorting would cost more than it saves. Weights are spread over their four inputs in registers instead.
constexpr int64_t kFewGradRows = 16;
constexpr int kFewTile = 4;  // vectors of inputs per pass

// W consecutive inputs of one output, zeros included, from `kept` values (at most W / 2).
template <class T>
TILEWISE_INLINE VF spread(const T* values, const uint8_t* indices, int64_t k, int64_t kept) {
  uint32_t word = indices[0];
  if (W == 16 && kept > 4) word |= uint32_t(indices[1]) << 8;
  if (W == 4) word >>= k % 8;
  const VI lane = iota(), pair = lane / 4 * 2, nibble = (VI)((VU)set1i(int32_t(word)) >> (VU)(lane / 4 * 4));
  const VF v = load(values, min_of<int64_t>(kept, W / 2));
  const VF second = select((nibble >> 2 & 3) == lane % 4, __builtin_shuffle(v, pair + 1), VF{});
  return select((nibble & 3) == lane % 4, __builtin_shuffle(v, pair), second);
}

template <class T, int R>
inline void few_columns(const NmGradInputParams& p, const float* dy, T* dx, int64_t k0) {
  constexpr int64_t kAhead = 16;  // rows of weights lie far apart: no hardware prefetcher follows
  const int64_t row_bytes = ceil_div(p.in, 8), half = p.in / 2,
                vectors = min_of<int64_t>(kFewTile, ceil_div(p.in - k0, W));
  VF acc[R][kFewTile] = {};
  for (int64_t o = 0; o < p.out;) {
    VF chain[R][kFewTile] = {};
    for (const int64_t stop = min_of(p.out, o + kOutBlock); o < stop; o++) {
      const T* values = static_cast<const T*>(p.values) + o * half + k0 / 2;
      const uint8_t* indices = p.indices + o * row_bytes + k0 / 8;
      __builtin_prefetch(values + kAhead * half);
      __builtin_prefetch(values + kAhead * half + kFewTile * W / 2 - 1);
      __builtin_prefetch(indices + kAhead * row_bytes);
      VF w[kFewTile];
#pragma GCC unroll 4
      for (int c = 0; c < kFewTile; c++) {
        const int64_t k = k0 + c * W;
        w[c] = c < vectors ? spread(values + c * W / 2, indices + c * W / 8, k, (p.in - k) / 2) : VF{};
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const VF d = set1(dy[r * p.out + o]);
#pragma GCC unroll 4
        for (int c = 0; c < kFewTile; c++) chain[r][c] += d * w[c];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int c = 0; c < kFewTile; c++) acc[r][c] += chain[r][c];
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < vectors; c++) store(dx + r * p.in + k0 + c * W, acc[r][c], p.in - k0 - c * W);
}

template <class T>
const char* nm_grad_input_few(const NmGradInputParams& p, const Runtime& rt) {
  constexpr int R = W == 16 ? 4 : 2;
  float* dy = scratch<float>(rt, 0, p.rows * p.out + W);
  if (!dy) return kOutOfMemory;
  for (int64_t r = 0; r < p.rows; r++)
    for (int64_t o = 0; o < p.out; o++) dy[r * p.out + o] = to_float(static_cast<const T*>(p.dy)[r * p.dy_stride + o]);
  parallel_for(rt, ceil_div(p.in, kFewTile * W), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      int64_t r = 0;
      T* dx = static_cast<T*>(p.dx);
      for (; r + R <= p.rows; r += R) few_columns<T, R>(p, dy + r * p.out, dx + r * p.in, i * kFewTile * W);
      for (; r < p.rows; r++) few_columns<T, 1>(p, dy + r * p.out, dx + r * p.in, i * kFewTile * W);
    }
  });
  return nullptr;
}

const char* nm_grad_input(const NmGradInputParams& p, const Runtime& rt) {
  return with_type(p.type, [&](auto t) {
    using T = decltype(t);
    return p.rows <= kFewGradRows || p.out == 0 ? nm_grad_input_few<T>(p, rt) : nm_grad_input_many<T>(p, rt);
  });
}

// ---- dvalues ----
// Each kept position is a dot product of a line of dy^T with a line of x^T over kDotRows rows: kDots of them share the
// line of dy^T, and the lanes are summed once per kDotRows.
constexpr int64_t kDotRows = 32 * W;
constexpr int64_t kDotColumns = 16;  // columns of x^T whose lines stay in the first-level cache
constexpr int64_t kDotBlock = 64;    // outputs that pass over them

template <class T>
inline void nm_dot_block(const NmGradValuesParams& p, const float* dy, const float* x, float* sums, int64_t vectors,
                         int64_t o0, int64_t width, bool fresh) {
  const int64_t row_bytes = ceil_div(p.in, 8), half = p.in / 2;
  for (int64_t k = 0; k < p.in; k += kDotColumns) {
    const int64_t kept = min_of(kDotColumns, p.in - k) / 2;
    for (int64_t o = o0; o < min_of(p.out, o0 + kDotBlock); o++) {
      uint32_t offsets[kDotColumns / 2 + W] = {};
      line_offsets(offsets, p.indices + o * row_bytes + k / 8, kept, width);
      for (int64_t e = kept; e < kDotColumns / 2; e++) offsets[e] = 0;
      for (int64_t e = 0; e < kept; e += kDots) {
        const int64_t n = min_of<int64_t>(kDots, kept - e);
        float* sum = sums + o * half + k / 2 + e;
        const VF dots = dot_lines(dy + o * width, vectors, offsets + e, x + k * width);
        store(sum, fresh ? dots : dots + load(sum, n), n);
      }
    }
  }
}

template <class T>
const char* nm_grad_values(const NmGradValuesParams& p, const Runtime& rt) {
  const int64_t width = min_of(kDotRows, round_up(p.rows, W)), half = p.in / 2;
  if (p.rows == 0) {
    __builtin_memset(p.dvalues, 0, size_t(p.out * half) * sizeof(T));
    return nullptr;
  }
  float* dy = scratch<float>(rt, 0, p.out * width);
  float* x = scratch<float>(rt, 1, p.in * width);
  float* sums = sizeof(T) == 4 ? static_cast<float*>(p.dvalues) : scratch<float>(rt, 2, p.out * half);
  if (!dy || !x || !sums) return kOutOfMemory;
  for (int64_t first = 0; first < p.rows; first += width) {
    const int64_t rows = min_of(width, p.rows - first), vectors = ceil_div(rows, W);
    const Panels panel(rt, rows, width, 0, 1);
    pack_panels(rt, panel, dy, static_cast<const T*>(p.dy) + first * p.dy_stride, p.dy_stride, p.out, 0);
    pack_panels(rt, panel, x, static_cast<const T*>(p.x) + first * p.x_stride, p.x_stride, p.in, 0);
    parallel_for(rt, ceil_div(p.out, kDotBlock), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) nm_dot_block<T>(p, dy, x, sums, vectors, i * kDotBlock, width, first == 0);
    });
  }
  if constexpr (sizeof(T) != 4) {
    parallel_for(rt, p.out * half, 16384, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i += W) store(static_cast<T*>(p.dvalues) + i, load(sums + i, end - i), end - i);
    });
  }
  return nullptr;
}

const char* nm_grad_values(const NmGradValuesParams& p, const Runtime& rt) {
  return with_type(p.type, [&](auto t) { return nm_grad_values<decltype(t)>(p, rt); });
}

// ---- dbias ----
// The sum of W columns, halves first: rounding grows with the logarithm of the number of rows.
template <class T>
VF sum_rows(const T* dy, int64_t stride, int64_t rows, int64_t columns) {
  constexpr int64_t kShort = 16;
  if (rows > kShort) {
    const int64_t half = rows / 2;
    return sum_rows(dy, stride, half, columns) + sum_rows(dy + half * stride, stride, rows - half, columns);
  }
  VF sum = {};
  for (int64_t r = 0; r < rows; r++) sum += load(dy + r * stride, columns);
  return sum;
}

template <class T>
const char* column_sum(const ColumnSumParams& p, const Runtime& rt) {
  parallel_for(rt, ceil_div(p.out, W), 8192 / (p.rows + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin * W; o < min_of(end * W, p.out); o += W) {
      const int64_t n = min_of<int64_t>(W, p.out - o);
      store(static_cast<T*>(p.total) + o, sum_rows(static_cast<const T*>(p.dy) + o, p.dy_stride, p.rows, n), n);
    }
  });
  return nullptr;
}

const char* column_sum(const ColumnSumParams& p, const Runtime& rt) {
  return with_type(p.type, [&](auto t) { return column_sum<decltype(t)>(p, rt); });
}

}  // namespace
}  // namespace tilewise
