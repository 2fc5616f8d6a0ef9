// Attention on AMX tiles that keeps tile unit and vector units busy at once, for bf16 and heads of 33 to 64 channels:
// the same sums as TileAttention's (tile_attention.h), in another order of work.
//
// A unit of work is 16 queries (a run) by 32 keys. While the vectors turn its scores into weights, the tile unit
// multiplies the scores of the next unit and adds what the previous run's weights and values make; its instructions
// stand between those of the rows, so that the core finds both within its window. Outputs of the previous run stay in
// tiles 0 to 3 for a whole block of keys.
#pragma once
#include "common/tile_attention.h"

namespace tilewise {
namespace {

// 2^(j / 32).
struct RootsOfTwo {
  alignas(64) float values[32] = {};
  constexpr RootsOfTwo() {
    double root = 1;
    for (float& value : values) {
      value = static_cast<float>(root);
      root *= 1.0218971486541166;
    }
  }
};
constexpr RootsOfTwo kRootsOfTwo;

// 2^t for t <= 127, and 0 for -inf: within 2e-7. As short as fast_exp2(), but with three multiplications less: while
// tiles are in use, 512-bit multiplications (and reduce, scalef and max) have one port, additions and permutations two.
class TableExp2 {
 public:
  TableExp2() : low_(load(kRootsOfTwo.values)), high_(load(kRootsOfTwo.values + W)) {}

  TILEWISE_INLINE VF operator()(VF t) const {
    constexpr int kDown = 0x09;                                           // towards -inf, raising no exception
    const VF fraction = (VF)_mm512_reduce_ps((__m512)t, 5 << 4 | kDown);  // below 1 / 32
    // The bits above it end up lowest, as an index.
    const __m512i index = (__m512i)_mm512_add_round_ps((__m512)t, (__m512)set1(1.5f * (1 << 18)), kDown);
    const VF root = (VF)_mm512_permutex2var_ps((__m512)low_, index, (__m512)high_);
    const VF p = (fraction * kSquare + kLinear) * fraction + kConstant;
    return (VF)_mm512_scalef_ps((__m512)(p * root), (__m512)t);
  }

 private:
  static constexpr float kConstant = 1, kLinear = 6.9312346e-1f, kSquare = 2.4266419e-1f;
  VF low_, high_;
};

class OverlappedAttention {
 public:
  static constexpr int kMaxRows = 512;

  static constexpr bool serves(int dim, int v_dim) {
    return ceil_div(dim, kTileDepth) == kSteps && ceil_div(v_dim, kTileDepth) * 2 == kColumnTiles;
  }

  // Blocks of up to `keys` keys, a multiple of 32.
  OverlappedAttention(int dim, int v_dim, float scale_log2, int keys)
      : dim_(dim), v_dim_(v_dim), scale_(set1(scale_log2)), keys_(keys), v_layout_{keys / kTileDepth} {}

  // Bytes of workspace, 64-byte aligned.
  int64_t bytes() const {
    return (keys_ * kSteps * kTileDepth + keys_ * kColumns + 2 * kTileRows * keys_) * sizeof(Packed) +
           (2 * kUnitScores + kTileRows * keys_ + kTileRows * W) * sizeof(float);
  }
  void use(void* memory) {
    k_ = static_cast<Packed*>(memory);
    v_ = k_ + keys_ * kSteps * kTileDepth;
    weights_[0] = v_ + keys_ * kColumns;
    weights_[1] = weights_[0] + kTileRows * keys_;
    scores_[0] = reinterpret_cast<float*>(weights_[1] + kTileRows * keys_);
    scores_[1] = scores_[0] + kUnitScores;
    all_scores_ = scores_[1] + kUnitScores;
    sums_ = all_scores_ + kTileRows * keys_;
  }

  // As TileAttention::add_block().
  template <class KRow, class VRow, class Plan>
  void add_block(AttentionRows* tiles, int count, const KRow& k, const VRow& v, int keys, const Plan& plan) {
    const int padded = static_cast<int>(round_up(keys, kTileDepth));
    pack_right_transposed<Bf16>(k_, kKeyLayout, k, keys, padded, dim_);
    pack_right<Bf16>(v_, v_layout_, v, keys, padded, v_dim_);

    Run runs[kMaxRows / kTileRows + 1];
    const int n = list_runs(tiles, count, plan, runs);
    if (n == 0) return;
    runs[n] = runs[n - 1];  // the scores computed ahead of it are not used
    pending_ = {};
    int now = 0;  // of the two buffers of scores
    score_first(runs[0].q, scores_[now]);
    for (int r = 0; r < n; r++) {
      plan.see(runs[r].tile,
               [&](const auto& visible) { weigh_run(plan, visible, runs[r], runs[r + 1].q, weights_[r % 2], now); });
      add_values(runs[r].units);
      pending_ = {weights_[r % 2], runs[r].out, runs[r].units};
    }
    add_values(0);
    for (int t = 0; t < count; t++) tiles[t].started |= plan.keys(t) > 0;
  }

 private:
  static constexpr int kSteps = 2, kColumnTiles = 4, kColumns = kColumnTiles * kTileRows;
  static constexpr int kScoreProducts = 2 * kSteps;           // of a unit
  static constexpr int kUnitScores = kTileRows * kTileDepth;  // [row][32]
  static constexpr TileLayout<1> kKeyLayout{kSteps};

  // 16 rows of a tile, against the keys of a block that it needs.
  struct Run {
    const Packed* q;
    float *out, *sums, *reference;
    bool started;
    int tile, first_row;  // of the tile
    int units;            // of 32 keys
  };
  // What is still to be added to the output of a run.
  struct Pending {
    const Packed* weights;
    float* out;
    int units;
  };

  int dim_, v_dim_;
  VF scale_;
  int keys_;
  TileLayout<1> v_layout_;
  TableExp2 exp2_;
  Packed *k_, *v_;      // right operands: keys by kKeyLayout, values by v_layout_
  Packed* weights_[2];  // left operands, of two runs in turn
  float* scores_[2];    // of two units in turn
  float* all_scores_;   // [row][keys_], of a run that is done again
  float* sums_;         // [row][W]: of the weights of a run
  Pending pending_;

  template <class Plan>
  int list_runs(const AttentionRows* tiles, int count, const Plan& plan, Run* runs) const {
    int n = 0;
    for (int t = 0; t < count; t++) {
      const int units = static_cast<int>(ceil_div(max_of(plan.keys(t), 0), kTileDepth));
      for (int row = 0; units > 0 && row < plan.rows(t); row += kTileRows)
        runs[n++] = {tiles[t].q + kKeyLayout.at(row / kTileRows, 0, 0),
                     tiles[t].out + row * kColumns,
                     tiles[t].sums + row * W,
                     tiles[t].reference + row,
                     tiles[t].started,
                     t,
                     row,
                     units};
    }
    return n;
  }

  // ---- the tile unit's part ----
  // Operands of a product in tiles 6 and 7, then the product.

  // Scores of a unit, in tiles 4 and 5.
  TILEWISE_INLINE static void load_for_scores(int i, const Packed* q, const Packed* k) {
    if (i == 0) zero_tile<4>();
    if (i == 1) zero_tile<5>();
    if (i % 2 == 0) load_tile<6>(q + kKeyLayout.at(0, 0, i / 2), 64);
    load_tile<7>(k + kKeyLayout.at(i % 2, 0, i / 2), 64);
  }
  TILEWISE_INLINE static void multiply_scores(int i) {
    i % 2 == 0 ? multiply_tiles<4, 6, 7>() : multiply_tiles<5, 6, 7>();
  }
  TILEWISE_INLINE static void store_scores(float* to) {
    store_tile<4>(to, kTileDepth * sizeof(float));
    store_tile<5>(to + kTileRows, kTileDepth * sizeof(float));
  }

  // Column tile i of the pending output: weights of a unit times its values.
  TILEWISE_INLINE void load_for_values(int i, int unit) const {
    if (i == 0 && unit == 0) begin_tiles<1, 4>(pending_.out, kColumns, true);
    if (i == 0) load_tile<6>(pending_.weights + unit * kTileSize, 64);
    load_tile<7>(v_ + v_layout_.at(i, 0, unit), 64);
  }
  TILEWISE_INLINE void multiply_values(int i, int unit) const {
    if (i == 0) multiply_tiles<0, 6, 7>();
    if (i == 1) multiply_tiles<1, 6, 7>();
    if (i == 2) multiply_tiles<2, 6, 7>();
    if (i == 3) multiply_tiles<3, 6, 7>();
    if (i == kColumnTiles - 1 && unit == pending_.units - 1) end_tiles<1, 4>(pending_.out, kColumns);
  }

  // Without weights to overlap with: at the ends of a block.
  void score_first(const Packed* q, float* to) const {
    for (int i = 0; i < kScoreProducts; i++) {
      load_for_scores(i, q, k_);
      multiply_scores(i);
    }
    store_scores(to);
  }
  void add_values(int unit) const {
    for (; unit < pending_.units; unit++)
      for (int i = 0; i < kColumnTiles; i++) {
        load_for_values(i, unit);
        multiply_values(i, unit);
      }
  }

  // ---- the vectors' part ----

  // Weights of a run, whose first scores are there; afterwards those of the next run, of query rows `next_q`, are.
  template <class Plan, class Visible>
  void weigh_run(const Plan& plan, const Visible& visible, const Run& run, const Packed* next_q, Packed* weights,
                 int& now) {
    if (!run.started) set_references(visible, run, scores_[now]);
    for (int unit = 0; unit < run.units; unit++, now ^= 1) {
      const bool last = unit == run.units - 1;
      const Packed* next_k = last ? k_ : k_ + kKeyLayout.at(2 * (unit + 1), 0, 0);
      weigh_unit(plan, visible, run, unit, scores_[now], weights, last ? next_q : run.q, next_k, scores_[now ^ 1]);
    }
    VF highest = {};
    for (int i = 0; i < kTileRows; i++) highest = max(highest, load(sums_ + i * W));
    if (any(highest > set1(kMostWeight))) raise_references(visible, run, weights);
    for (int i = 0; i < kTileRows * W; i += W) store(run.sums + i, load(run.sums + i) + load(sums_ + i));
  }

  // Rows of a unit and, before each, half a product of the next unit or the previous run.
  template <class Plan, class Visible>
  __attribute__((noinline)) void weigh_unit(const Plan& plan, const Visible& visible, const Run& run, int unit,
                                            const float* scores, Packed* weights, const Packed* next_q,
                                            const Packed* next_k, float* next_scores) const {
    static_assert(2 * (kScoreProducts + kColumnTiles) == kTileRows);
    constexpr int kStoreScores = 10;  // the row by which they are there
    const bool adds = unit < pending_.units;
    weights += unit * kTileSize;
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; i++) {
      const int product = i / 2, column = product - kScoreProducts;
      if (column < 0)
        i % 2 == 0 ? load_for_scores(product, next_q, next_k) : multiply_scores(product);
      else if (adds)
        i % 2 == 0 ? load_for_values(column, unit) : multiply_values(column, unit);
      if (i == kStoreScores) store_scores(next_scores);
      plan.meanwhile();
      weigh_row(visible, run, i, unit, scores + i * kTileDepth, weights + i * kTileDepth);
    }
  }

  template <class Visible>
  TILEWISE_INLINE void weigh_row(const Visible& visible, const Run& run, int i, int unit, const float* scores,
                                 Packed* weights) const {
    const int row = run.first_row + i, key = unit * kTileDepth;
    const VF reference = set1(run.reference[i]);
    const VF low = exp2_(seen_score(visible, load(scores) * scale_, reference, row, key));
    const VF high = exp2_(seen_score(visible, load(scores + W) * scale_, reference, row, key + W));
    Halves parts[1];
    split(low, high, parts);
    _mm512_store_si512(weights, parts[0]);
    VF sum = low + high;
    if (unit > 0) sum += load(sums_ + i * W);
    store(sums_ + i * W, sum);
  }

  // ---- references (TileAttention) ----

  template <class Visible>
  void set_references(const Visible& visible, const Run& run, const float* scores) const {
    for (int i = 0; i < kTileRows; i++, scores += kTileDepth)
      run.reference[i] =
          max_of(seen_score(visible, load(scores) * scale_, VF{}, run.first_row + i, 0)[0], kLowestReference);
  }

  // Raises the references of the rows that need it to their largest score of the block, and does those rows again.
  // Their scores have been overwritten by then.
  template <class Visible>
  void raise_references(const Visible& visible, const Run& run, Packed* weights) const {
    multiply_columns<1, 1>({run.q, 0, 0}, k_, kKeyLayout, 2 * run.units, kSteps, all_scores_, keys_, false);
    const float* scores = all_scores_;
    for (int i = 0; i < kTileRows; i++, scores += keys_) {
      if (!any(load(sums_ + i * W) > set1(kMostWeight))) continue;
      raise_reference(visible, run, i, scores);
      for (int unit = 0; unit < run.units; unit++)
        weigh_row(visible, run, i, unit, scores + unit * kTileDepth, weights + unit * kTileSize + i * kTileDepth);
    }
  }
  template <class Visible>
  void raise_reference(const Visible& visible, const Run& run, int i, const float* scores) const {
    VF peak = set1(run.reference[i]);
    for (int key = 0; key < run.units * kTileDepth; key += W)
      peak = max(peak, seen_score(visible, load(scores + key) * scale_, VF{}, run.first_row + i, key));
    const float before = run.reference[i], after = reduce_max(peak);
    const VF factor = exp2(set1(before) - set1(after));
    run.reference[i] = after;
    store(run.sums + i * W, load(run.sums + i * W) * factor);
    float* out = run.out + i * kColumns;
    for (int d = 0; d < kColumns; d += W) store(out + d, load(out + d) * factor);
  }
};

}  // namespace
}  // namespace tilewise
