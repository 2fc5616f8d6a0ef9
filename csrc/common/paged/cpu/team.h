// Few queries on AMX tiles: a team of key heads, a few rows each, passes over a range of keys together, so that
// pages are read as they lie in memory. Here is what is common to tiles of bf16 (team_words.h) and of bytes
// (team_bytes.h).
#pragma once
#include "common/paged/cpu/ahead.h"
#include "common/paged/cpu/attention.h"
#include "common/tile_attention.h"

namespace tilewise::paged {
namespace {

constexpr int kTeamKeys = 2 * kTileRows;
constexpr Share kTeamShare = {8, kTeamKeys, 512};
alignas(64) constexpr char kZeroRow[2 * kMaxHeadDim + 64] = {};

inline int team_rows(const AttentionParams& p) {
  return p.tokens * (p.q_heads / p.kv_heads);
}

// The running result of one head's rows.
struct TeamHead {
  int32_t* q;        // [step][row of a tile][part][row], what a product sums: two words, or four bytes
  float* out;        // [outputs' rows][outputs' columns]
  float* sums;       // [row][W] of weights, to be added up at the end
  float* zeros;      // [row][W] likewise, of weights times the values' zeros
  float* reference;  // [row]
  float* q_sums;     // [row], for the keys' zeros
  float* q_units;    // [row], what 1 stands for in `q`
};

// Sixteen keys or values as operands of products.
struct TileRows {
  const char* first;
  int64_t row_bytes, step_bytes;
};

// What the keys' and values' scales and zeros make of scores and weights; nothing where rows have none.
template <int N>
struct Scaling {
  VF k_scale[N], k_zero[N], v_scale[N], v_zero[N];

  // pairs(values, i): those of 16 rows.
  template <class Pairs>
  TILEWISE_INLINE Scaling(const Pairs& pairs, float factor) {
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) {
      const VI k = pairs(false, i), v = pairs(true, i);
      k_scale[i] = ScaleZero::scale(k) * factor;
      k_zero[i] = ScaleZero::zero(k);
      v_scale[i] = ScaleZero::scale(v);
      v_zero[i] = ScaleZero::zero(v);
    }
  }
};

// Scales and zeros of 16 rows of which the first `count` are there, `behind` the rows' beginnings.
TILEWISE_INLINE VI gather_pairs(const char* const* rows, int64_t behind, int count) {
  const __mmask16 there = lane_mask(max_of(0, count));
  __m256i pairs[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++)
    pairs[i] = _mm512_mask_i64gather_epi32(
        _mm256_setzero_si256(), __mmask8(there >> i * 8),
        _mm512_add_epi64(_mm512_loadu_si512(rows + i * 8), _mm512_set1_epi64(behind)), nullptr, 1);
  return (VI)_mm512_inserti64x4(_mm512_castsi256_si512(pairs[0]), pairs[1], 1);
}

// Outputs are sums of weights with values: those of row m are the rows m, m + rows, ... of `out`, several parts of them
// or of different channels.
template <class Source, class Visibility, int Keys = kTeamKeys>
struct Team {
  static constexpr int kRing = 4, kKeys = Keys, kVectors = Keys / W;

  const Task<Visibility>& task;
  Softcap softcap;
  int rows, out_rows, out_columns;  // `rows`: at least the task's
  float factor;
  TeamHead heads[kTeamShare.heads];
  KeyRows blocks[kRing];
  int32_t places[kMaxHeadDim];  // of the channels in `out`

  Team(const Task<Visibility>& task, int rows, int out_rows, int out_columns)
      : task(task),
        softcap(task.p),
        rows(rows),
        out_rows(out_rows),
        out_columns(out_columns),
        factor(task.p.scale * kLog2e) {}

  // ---- memory ----

  int64_t state() const { return int64_t(out_rows) * out_columns + int64_t(rows) * (2 * W + 3); }

  // `q`, then `at`: what of them each head needs.
  void share_out(int32_t* q, int64_t q_size, float* at) {
    for (int64_t i = 0; i < task.heads * state(); i++) at[i] = 0;
    for (int h = 0; h < task.heads; h++, q += q_size, at += state()) {
      float *sums = at + int64_t(out_rows) * out_columns, *reference = sums + 2 * rows * W;
      heads[h] = {q, at, sums, sums + rows * W, reference, reference + rows, reference + 2 * rows};
      for (int m = 0; m < rows; m++) reference[m] = kLowest;
    }
  }
  // Row m's query, unscaled.
  void load_query(TeamHead& head, const Task<Visibility>& own, int m, float* row, int columns) const {
    own.load_query(min_of(m, task.rows - 1), row, columns, 1.f);
    VF sum = {};
    for (int d = 0; d < columns; d += W) sum += load(row + d);
    head.q_sums[m] = reduce_add(sum) * factor;
  }

  void find(KeyRows& block, int64_t from) const {
    block.find(task, from, task.keys.block_end(from, kKeys), Source(task.p.dim));
  }

  // ---- weights ----

  uint64_t seen_by(int m, const KeyRows& block) const {
    static_assert(kKeys <= 64);
    const uint64_t all = ~uint64_t(0) >> (64 - block.count);
    return task.keys.full(block.first) ? all : all & task.visible.seen(task.token(m), block.first).words[0];
  }
  template <class Bytes>
  TILEWISE_INLINE Scaling<kVectors> scaling(const Bytes& bytes, const KeyRows& block, int head) const {
    const auto pairs = [&](bool values, int i) {
      const int64_t head_bytes = (values ? task.p.v_strides : task.p.k_strides).head;
      const char* const* rows = (values ? block.v : block.k) + i * W;
      return gather_pairs(rows, head * head_bytes + bytes.code_bytes(), block.count - i * W);
    };
    return {pairs, factor};
  }

  // Products to scores, to weights as they meet values.
  TILEWISE_INLINE void weigh_row(const TeamHead& head, const Scaling<kVectors>& scaling, int m, VF (&x)[kVectors],
                                 uint64_t seen) {
    VF largest = set1(-kInfinity);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; i++) {
      if constexpr (Source::kScaled)
        x[i] = x[i] * scaling.k_scale[i] + scaling.k_zero[i] * set1(head.q_sums[m]);
      else
        x[i] *= factor;
      if (softcap) x[i] = softcap(x[i]);
      x[i] = (VF)_mm512_mask_mov_ps(_mm512_set1_ps(-kInfinity), __mmask16(seen >> i * W), (__m512)x[i]);
      largest = max(largest, x[i]);
    }
    if (any(largest > set1(head.reference[m] + kReferenceSlack))) raise_reference(head, m, reduce_max(largest));
    VF sum = load(head.sums + m * W), zero = load(head.zeros + m * W);
    const VF reference = set1(head.reference[m]);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; i++) {
      x[i] = fast_exp2(x[i] - reference);
      sum += x[i];
      if constexpr (Source::kScaled) {
        zero += x[i] * scaling.v_zero[i];
        x[i] *= scaling.v_scale[i];
      }
    }
    store(head.sums + m * W, sum);
    if constexpr (Source::kScaled) store(head.zeros + m * W, zero);
  }
  void raise_reference(const TeamHead& head, int m, float top) {
    const VF shrink = exp2(set1(head.reference[m] - top));
    head.reference[m] = top;
    store(head.sums + m * W, load(head.sums + m * W) * shrink);
    store(head.zeros + m * W, load(head.zeros + m * W) * shrink);
    for (int row = m; row < out_rows; row += rows)
      for (float *at = head.out + row * out_columns, *end = at + out_columns; at < end; at += W)
        store(at, load(at) * shrink);
  }

  // ---- results ----

  bool finite(const TeamHead& head) const {
    VF zero = {};  // NaN from the first infinity or NaN on
    for (int i = 0; i < out_rows * out_columns + 2 * rows * W; i += W) zero += load(head.out + i) * 0.f;
    return !any(zero != zero);
  }
  // `parts`: rows of `out` between those that add up.
  void write(const TeamHead& head, const Task<Visibility>& own, int parts) const {
    float row[kMaxHeadDim + W];
    for (int m = 0; m < task.rows; m++) {
      const float zero = reduce_add(load(head.zeros + m * W));
      for (int d = 0; d < task.p.dim; d++) {
        row[d] = zero;
        for (int part = 0; part < parts; part++) row[d] += head.out[places[d] + (part * rows + m) * out_columns];
      }
      own.write(m, row, head.reference[m], reduce_add(load(head.sums + m * W)));
    }
  }
};

// What a team works on next: a block of keys and one of the heads.
struct TeamItem {
  int block, head;  // place in the ring

  TeamItem next(int heads, int ring) const {
    return head + 1 < heads ? TeamItem{block, head + 1} : TeamItem{(block + 1) % ring, 0};
  }
};

template <class Work>
void run_team(Work& work) {
  using Source = typename Work::Rows;
  const TileScope scope(work.tile_sizes());
  constexpr int kRing = Work::kRing;
  const auto& task = work.task;
  KeyRows(&blocks)[kRing] = work.blocks;
  work.find(blocks[0], task.keys.first);
  for (int i = 1; i < kRing - 1; i++) work.find(blocks[i], blocks[i - 1].first + blocks[i - 1].count);
  if (!blocks[0].count) return;
  const int64_t k_bytes = task.p.k_strides.head * Source::kItem, v_bytes = task.p.v_strides.head * Source::kItem;
  TeamItem item = {0, 0}, next = item.next(task.heads, kRing);
  work.begin(item, next);
  for (int turn = 0; blocks[item.block].count;) {
    const int furthest = (item.block + kRing - 1) % kRing, before = (item.block + kRing - 2) % kRing;
    work.find(blocks[furthest], blocks[before].first + blocks[before].count);
    Ahead ahead(blocks[task.heads < 4 ? furthest : (item.block + 1) % kRing], k_bytes, v_bytes, task.heads);
    const int lines = work.lines(ahead);
    for (int h = 0; h < task.heads; h++, turn ^= 1) {
      const TeamItem after = next.next(task.heads, kRing);
      work.step(item, next, after, turn, ahead, lines);
      item = next;
      next = after;
    }
  }
  work.end();
}

template <class Work, class Visibility>
bool attend_team(const Task<Visibility>& task, const Runtime& rt) {
  Work work(task);
  if (!work.start(rt)) return false;
  work.run();
  uint32_t left = 0;  // heads that another kernel has to decide: parts of infinite inputs may have become NaN
  for (int h = 0; h < task.heads; h++) {
    if (work.finite(work.heads[h]))
      work.write(work.heads[h], task.of_head(h), work.parts);
    else
      left |= 1u << h;
  }
  for (int h = 0; h < task.heads; h++)
    if (left >> h & 1 && !attend_rows<typename Work::Rows>(task.of_head(h), rt)) return false;
  return true;
}

}  // namespace
}  // namespace tilewise::paged
