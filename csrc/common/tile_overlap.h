// Attention on AMX tiles that keeps tile unit and vector units busy at once, for heads of 33 to 64 channels: the same
// sums as TileAttention's (tile_attention.h), in another order of work.
//
// A unit of work is 16 queries (a run) by 32 keys. While the vectors turn its scores into weights, the tile unit
// multiplies the scores of the next unit and adds what the previous run's weights and values make; its instructions
// stand between those of the rows, so that the core finds both within its window. Outputs of the previous run stay in
// tiles 0 to 3 for a whole block of keys.
#pragma once
#include "common/tile_rows.h"

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

// Weights in one part of 8 bits may be off by 2e-7.
template <int P>
struct OverlappedExp2 : FastExp2 {};
template <>
struct OverlappedExp2<1> : TableExp2 {};

// The products of a unit, in the order in which they are made: the next unit's scores, then values.
template <class Products>
struct UnitProducts {
  static constexpr int kSteps = 2, kKeyTiles = 2, kColumnTiles = 4;
  static constexpr int kScores = kSteps * Products::count * kKeyTiles,
                       kCount = kScores + Products::count * kColumnTiles;
  static constexpr int kSmall = Products::count - 1;  // of a step

  struct Product {
    bool score;
    int step, left, right, column;  // left, right: parts; column: of result tiles
    bool new_left;                  // operand, than that of the product before
    bool begins, ends;              // its sum; all sums
  };
  Product all[kCount] = {};

  constexpr UnitProducts() {
    for (int i = 0; i < kCount; i++) {
      const bool score = i < kScores;
      const int n = score ? i : i - kScores, columns = score ? kKeyTiles : kColumnTiles;
      const int pair = n / columns, small = (score ? kSteps : 1) * kSmall;
      const bool large = pair >= small;  // the last, as in multiply_packed()
      const int part = large ? 0 : 1 + pair % kSmall;
      const bool new_part = part <= 1 || Products::left[part] != Products::left[part - 1];
      all[i] = {score,
                large ? pair - small : pair / kSmall,
                Products::left[part],
                Products::right[part],
                n % columns,
                n % columns == 0 && new_part,
                pair == 0,
                n == (score ? kScores : kCount - kScores) - 1};
    }
  }
};

template <class T, class Operands = Bf16Operands<T>>
class OverlappedAttention : public RowsOnTiles<T, Operands> {
  using Base = RowsOnTiles<T, Operands>;

 public:
  static constexpr int kMaxRows = 512;

  static constexpr bool serves(int dim, int v_dim) {
    return ceil_div(dim, kTileDepth) == kSteps && ceil_div(v_dim, kTileDepth) * 2 == Order::kColumnTiles;
  }

  OverlappedAttention(int dim, int v_dim, float scale_log2) : Base(dim, v_dim, scale_log2, kMaxBlockKeys) {}

  // Bytes of workspace, 64-byte aligned.
  int64_t bytes(int /*tiles*/) const {
    return (key_size() + value_size() + 2 * weight_size()) * sizeof(Packed) +
           (2 * kUnitScores + kTileRows * keys_ + kTileRows * W) * sizeof(float);
  }
  void use(void* memory) {
    k_ = static_cast<Packed*>(memory);
    values_ = k_ + key_size();
    weights_[0] = values_ + value_size();
    weights_[1] = weights_[0] + weight_size();
    scores_[0] = reinterpret_cast<float*>(weights_[1] + weight_size());
    scores_[1] = scores_[0] + kUnitScores;
    all_scores_ = scores_[1] + kUnitScores;
    sums_ = all_scores_ + kTileRows * keys_;
  }

  static int64_t calls(int rows, int keys) {
    return ceil_div(rows, kTileRows) * ceil_div(keys, kTileDepth) * kUnitCalls;
  }

  // As TileAttention::add_block().
  template <class KRow, class VRow, class Plan>
  void add_block(AttentionRows* tiles, int count, const KRow& k, const VRow& v, int keys, const Plan& plan) {
    this->pack_keys(k_, tiles, k, keys);
    this->pack_values(values_, tiles, count, plan, v, keys);

    Run runs[kMaxRows / kTileRows + 1];
    const int n = list_runs(tiles, count, plan, runs);
    if (n == 0) return;
    runs[n] = runs[n - 1];  // the scores computed ahead of it are not used
    pending_ = {};
    int now = 0;  // of the two buffers of scores
    score_first(runs[0].rows.q, scores_[now]);
    for (int r = 0; r < n; r++) {
      plan.see(runs[r].tile, [&](const auto& visible) {
        weigh_run(plan, visible, runs[r], runs[r + 1].rows.q, weights_[r % 2], now);
      });
      pending_ = {weights_[r % 2], runs[r].rows.out, runs[r].units};
    }
    add_values(0);
    for (int t = 0; t < count; t++) tiles[t].started |= plan.keys(t) > 0;
  }

 private:
  using Base::P, Base::keys_, Base::v_, Base::key_size, Base::value_size;
  using Products = typename Operands::Products;
  using Order = UnitProducts<Products>;
  using Product = typename Order::Product;

  static constexpr Order kOrder{};
  static constexpr int kSteps = Order::kSteps, kColumns = Order::kColumnTiles * kTileRows;
  static constexpr int kUnitCalls = 4;                        // of meanwhile()
  static constexpr int kUnitScores = kTileRows * kTileDepth;  // [row][32]
  static constexpr TileLayout<P> kKeyLayout{kSteps};

  // 16 rows of a tile, against the keys of a block that it needs.
  struct Run {
    AttentionRows rows;
    int tile;
    int units;  // of 32 keys
  };
  // What is still to be added to the output of a run.
  struct Pending {
    const Packed* weights;
    float* out;
    int units;
  };

  OverlappedExp2<P> exp2_;
  Packed *k_, *values_;  // right operands: keys by kKeyLayout, values by v_
  Packed* weights_[2];   // left operands, of two runs in turn
  float* scores_[2];     // of two units in turn
  float* all_scores_;    // [row][keys_], of a run that is done again
  float* sums_;          // [row][W]: of the weights of a run
  Pending pending_;

  int64_t weight_size() const { return v_.at(1, 0, 0); }

  template <class Plan>
  int list_runs(const AttentionRows* tiles, int count, const Plan& plan, Run* runs) const {
    int n = 0;
    for (int t = 0; t < count; t++) {
      const int units = static_cast<int>(ceil_div(max_of(plan.keys(t), 0), kTileDepth));
      for (int row = 0; units > 0 && row < plan.rows(t); row += kTileRows) {
        AttentionRows rows = tiles[t];
        rows.q += kKeyLayout.at(row / kTileRows, 0, 0);
        rows.out += row * kColumns;
        rows.sums += row * W;
        rows.reference += row;
        if constexpr (Operands::kScaled) rows.units += row;
        rows.first = row;
        runs[n++] = {rows, t, units};
      }
    }
    return n;
  }

  // ---- the tile unit's part ----
  // Operands of a product in tiles 6 and 7, then the product: of scores to tiles 4 and 5, of values to tiles 0 to 3.

  TILEWISE_INLINE static void load_for_scores(const Product& it, const Packed* q, const Packed* k) {
    if (it.begins) it.column == 0 ? zero_tile<4>() : zero_tile<5>();
    if (it.new_left) load_tile<6>(q + kKeyLayout.at(0, it.left, it.step), 64);
    load_tile<7>(k + kKeyLayout.at(it.column, it.right, it.step), 64);
  }
  TILEWISE_INLINE static void multiply_scores(const Product& it) {
    it.column == 0 ? Products::template multiply<4, 6, 7>() : Products::template multiply<5, 6, 7>();
  }
  TILEWISE_INLINE static void store_scores(float* to) {
    store_tile<4>(to, kTileDepth * sizeof(float));
    store_tile<5>(to + kTileRows, kTileDepth * sizeof(float));
  }

  TILEWISE_INLINE void load_for_values(const Product& it, int unit) const {
    if (it.begins && it.column == 0 && unit == 0) begin_tiles<1, 4>(pending_.out, kColumns, true);
    if (it.new_left) load_tile<6>(pending_.weights + v_.at(0, it.left, unit), 64);
    load_tile<7>(values_ + v_.at(it.column, it.right, unit), 64);
  }
  TILEWISE_INLINE void multiply_values(const Product& it, int unit) const {
    if (it.column == 0) Products::template multiply<0, 6, 7>();
    if (it.column == 1) Products::template multiply<1, 6, 7>();
    if (it.column == 2) Products::template multiply<2, 6, 7>();
    if (it.column == 3) Products::template multiply<3, 6, 7>();
    if (it.ends && unit == pending_.units - 1) end_tiles<1, 4>(pending_.out, kColumns);
  }

  // Without weights to overlap with: at the ends of a block.
  void score_first(const Packed* q, float* to) const {
#pragma GCC unroll 32
    for (int i = 0; i < Order::kScores; i++) {
      load_for_scores(kOrder.all[i], q, k_);
      multiply_scores(kOrder.all[i]);
    }
    store_scores(to);
  }
  void add_values(int unit) const {
    for (; unit < pending_.units; unit++)
#pragma GCC unroll 32
      for (int i = Order::kScores; i < Order::kCount; i++) {
        load_for_values(kOrder.all[i], unit);
        multiply_values(kOrder.all[i], unit);
      }
  }

  // ---- the vectors' part ----

  // Weights of a run, whose first scores are there; afterwards those of the next run, of query rows `next_q`, are, and
  // nothing is pending.
  template <class Plan, class Visible>
  void weigh_run(const Plan& plan, const Visible& visible, const Run& run, const Packed* next_q, Packed* weights,
                 int& now) {
    if (!run.rows.started)
      for (int i = 0; i < kTileRows; i++)
        this->set_reference(run.rows, i, scores_[now] + i * kTileDepth, kTileDepth, visible);
    for (int unit = 0; unit < run.units; unit++, now ^= 1) {
      const bool last = unit == run.units - 1;
      const Packed* next_k = last ? k_ : k_ + kKeyLayout.at(2 * (unit + 1), 0, 0);
      weigh_unit(plan, visible, run.rows, unit, scores_[now], weights + v_.at(0, 0, unit), last ? next_q : run.rows.q,
                 next_k, scores_[now ^ 1]);
    }
    add_values(run.units);
    VF highest = {};
    for (int i = 0; i < kTileRows; i++) highest = max(highest, load(sums_ + i * W));
    if (any(highest > set1(kMostWeight))) raise_references(visible, run, weights);
    for (int i = 0; i < kTileRows * W; i += W) store(run.rows.sums + i, load(run.rows.sums + i) + load(sums_ + i));
  }

  // Rows of a unit and, before each, its share of the products of the next unit and the previous run.
  template <class Plan, class Visible>
  __attribute__((noinline)) void weigh_unit(const Plan& plan, const Visible& visible, const AttentionRows& rows,
                                            int unit, const float* scores, Packed* weights, const Packed* next_q,
                                            const Packed* next_k, float* next_scores) const {
    constexpr int kHalves = 2 * Order::kCount / kTileRows;          // of products, a row
    constexpr int kStoreScores = 2 * Order::kScores / kHalves + 2;  // the row by which they are there
    const bool adds = unit < pending_.units;
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; i++) {
#pragma GCC unroll 4
      for (int half = i * kHalves; half < (i + 1) * kHalves; half++) {
        const Product& it = kOrder.all[half / 2];
        if (it.score)
          half % 2 == 0 ? load_for_scores(it, next_q, next_k) : multiply_scores(it);
        else if (adds)
          half % 2 == 0 ? load_for_values(it, unit) : multiply_values(it, unit);
      }
      if (i == kStoreScores) store_scores(next_scores);
      if (i % (kTileRows / kUnitCalls) == 0) plan.meanwhile();
      weigh_row(visible, rows, i, unit, scores + i * kTileDepth, weights + i * kTileDepth);
    }
  }

  template <class Visible>
  TILEWISE_INLINE void weigh_row(const Visible& visible, const AttentionRows& rows, int i, int unit,
                                 const float* scores, Packed* weights) const {
    VF low, high;
    this->weigh_keys(this->scale_of_row(rows, i), scores, unit * kTileDepth, exp2_, visible, low, high, weights);
    VF sum = low + high;
    if (unit > 0) sum += load(sums_ + i * W);
    store(sums_ + i * W, sum);
  }

  // Raises the references of the rows that need it, and does those rows again. Their scores have been overwritten by
  // then.
  template <class Visible>
  void raise_references(const Visible& visible, const Run& run, Packed* weights) const {
    multiply_columns<P, 1, Products>(run_of(run.rows.q, kKeyLayout, 0), k_, kKeyLayout, 2 * run.units, kSteps,
                                     all_scores_, keys_, false);
    const float* scores = all_scores_;
    for (int i = 0; i < kTileRows; i++, scores += keys_) {
      if (!any(load(sums_ + i * W) > set1(kMostWeight))) continue;
      this->raise_reference(run.rows, i, scores, run.units * kTileDepth, visible);
      for (int unit = 0; unit < run.units; unit++)
        weigh_row(visible, run.rows, i, unit, scores + unit * kTileDepth, weights + v_.at(0, 0, unit) + i * kTileDepth);
    }
  }
};

}  // namespace
}  // namespace tilewise
