// Products of square matrices for the Bjorck step. A panel of columns of the right matrix is packed, kDepth rows at a
// time, into the first-level cache; blocks of kBlockRows rows of the left matrix are broadcast against it.
#pragma once
#include "common/isa.h"
#include "common/transpose.h"
#include "optim/params.h"

namespace tilewise {
namespace {

using namespace optim;

#if defined(__AVX512F__)
constexpr int kBlockRows = 6, kPanelVectors = 4;  // 24 accumulators of 32 registers
#else
constexpr int kBlockRows = 4, kPanelVectors = 3;  // 12 of 16
#endif
constexpr int kPanel = kPanelVectors * W;
// Rows packed at once; sums of so many terms are added up, so rounding grows with kDepth + order / kDepth. Without FMA
// every term is rounded twice, and sums are shorter.
constexpr int kDepth = W == 4 ? 16 : 128;

struct Panel {
  int64_t first, width;                       // columns of the result
  alignas(64) float packed[kDepth * kPanel];  // [depth, kPanel], zero beyond width
};

// packed[k][c] = source[k * order + c]
inline void pack_rows(Panel& panel, const float* source, int64_t order, int depth) {
  for (int k = 0; k < depth; k++)
    for (int v = 0; v < kPanelVectors; v++) {
      const int64_t left = max_of<int64_t>(0, panel.width - v * W);
      store(panel.packed + k * kPanel + v * W, load(source + k * order + min_of<int64_t>(v * W, panel.width), left));
    }
}

// packed[k][c] = source[c * order + k]
inline void pack_columns(Panel& panel, const float* source, int64_t order, int depth) {
  for (int c = 0; c < kPanel; c += W)
    for (int k = 0; k < depth; k += W) {
      VF rows[W];
      for (int i = 0; i < W; i++)
        rows[i] = c + i < panel.width ? load(source + (c + i) * order + k, depth - k) : set1(0);
      transpose(rows);
      for (int i = 0; i < W && k + i < depth; i++) store(panel.packed + (k + i) * kPanel + c, rows[i]);
    }
}

// target += sums over `depth` of M rows of `left` (rows `order` apart) with the panel, times `factor`; in the first
// chunk of the depth the target is `initial`, times its factor, or zero.
struct PanelProduct {
  const float* left;     // [count, depth]
  float* target;         // [count, width]
  const float* initial;  // [count, width]; null: zero
  float factor, initial_factor;
  int64_t order, count;
  int depth;
  bool is_first;
};

template <int M>
TILEWISE_INLINE void finish_rows(const Panel& panel, const PanelProduct& q, int64_t i,
                                 const VF (&sums)[M][kPanelVectors]) {
  const float* before = q.is_first ? q.initial : q.target;
  const VF before_factor = set1(q.is_first ? q.initial_factor : 1);
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVectors; v++) {
      const int64_t at = (i + m) * q.order + v * W, lanes = min_of<int64_t>(W, panel.width - v * W);
      if (lanes <= 0) continue;
      VF sum = sums[m][v] * set1(q.factor);
      if (before) sum += load(before + at, lanes) * before_factor;
      store(q.target + at, sum, lanes);
    }
}

template <int M>
void multiply_rows(const Panel& panel, const PanelProduct& q, int64_t i) {
  VF sums[M][kPanelVectors] = {};
  const float *left = q.left + i * q.order, *right = panel.packed;
  constexpr int kLine = 16;  // floats
  for (int k = 0; k < q.depth;) {
    // The next rows, which no hardware prefetcher expects: each stands in a page of its own.
    for (int m = 0; m < M; m++) __builtin_prefetch(left + (M + m) * q.order + k, 0, 2);
    for (const int end = min_of(k + kLine, q.depth); k < end; k++, right += kPanel) {
      VF row[kPanelVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kPanelVectors; v++) row[v] = load(right + v * W);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const VF x = set1(left[m * q.order + k]);
#pragma GCC unroll 8
        for (int v = 0; v < kPanelVectors; v++) sums[m][v] += x * row[v];
      }
    }
  }
  finish_rows(panel, q, i, sums);
}

inline void multiply_panel(const Panel& panel, const PanelProduct& q) {
  int64_t i = 0;
  for (; i + kBlockRows <= q.count; i += kBlockRows) multiply_rows<kBlockRows>(panel, q, i);
  for (; i + 2 <= q.count; i += 2) multiply_rows<2>(panel, q, i);
  if (i < q.count) multiply_rows<1>(panel, q, i);
}

// defect = I - rows rows^T above the diagonal and on it, for the columns of one panel; the second product is of small
// numbers then, and so are its roundings.
inline void defect_panel(const float* rows, float* defect, int64_t order, Panel& panel) {
  for (int64_t k = 0; k < order; k += kDepth) {
    const int depth = int(min_of<int64_t>(kDepth, order - k));
    pack_columns(panel, rows + panel.first * order + k, order, depth);
    multiply_panel(panel,
                   {rows + k, defect + panel.first, nullptr, -1, 0, order, panel.first + panel.width, depth, k == 0});
  }
  for (int64_t i = panel.first; i < panel.first + panel.width; i++) defect[i * order + i] += 1;
}

// out = rows + 0.5 defect rows, for the columns of one panel.
inline void rectify_panel(const float* rows, const float* defect, float* out, int64_t order, Panel& panel) {
  for (int64_t k = 0; k < order; k += kDepth) {
    const int depth = int(min_of<int64_t>(kDepth, order - k));
    pack_rows(panel, rows + k * order + panel.first, order, depth);
    multiply_panel(panel, {defect + k, out + panel.first, rows + panel.first, .5f, 1, order, order, depth, k == 0});
  }
}

// Below the diagonal what stands above it, for rows [first, last).
inline void mirror(float* defect, int64_t order, int64_t first, int64_t last) {
  constexpr int64_t kSquare = 16;  // whose lines stay in the cache
  for (int64_t j = 0; j < last; j += kSquare)
    for (int64_t i = first; i < last; i++)
      for (int64_t c = j; c < min_of(j + kSquare, i); c++) defect[i * order + c] = defect[c * order + i];
}

// Calls body(offset of the matrix, panel) for every panel of every matrix, wide and narrow triangles alternating so
// that equal ranges are equal work.
template <class Body>
void for_each_panel(const OrthonormalizeParams& p, const Runtime& rt, const Body& body) {
  const int64_t panels = ceil_div(p.order, kPanel);
  parallel_for(rt, p.batch * panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t i = task % panels, first = (i % 2 ? panels - 1 - i / 2 : i / 2) * kPanel;
      Panel panel;
      panel.first = first, panel.width = min_of<int64_t>(kPanel, p.order - first);
      body(task / panels * p.order * p.order, panel);
    }
  });
}

const char* orthonormalize(const OrthonormalizeParams& p, const Runtime& rt) {
  for_each_panel(p, rt, [&](int64_t at, Panel& panel) { defect_panel(p.rows + at, p.defect + at, p.order, panel); });
  parallel_for(rt, p.batch * p.order, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end;) {
      const int64_t matrix = row / p.order, first = row % p.order;
      const int64_t count = min_of(min_of(end - row, p.order - first), int64_t{16});
      mirror(p.defect + matrix * p.order * p.order, p.order, first, first + count);
      row += count;
    }
  });
  for_each_panel(
      p, rt, [&](int64_t at, Panel& panel) { rectify_panel(p.rows + at, p.defect + at, p.out + at, p.order, panel); });
  return nullptr;
}

}  // namespace
}  // namespace tilewise
