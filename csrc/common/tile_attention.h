// Attention of a few rows of queries to a block of keys, on AMX tiles: S = Q K^T, weights = exp2(S - reference),
// O += weights V (Dao et al., arXiv:2205.14135). The rows are tokens, heads of a group or both, the keys come from
// anywhere; what a row may see is a policy.
#pragma once
#include "common/tile_rows.h"

namespace tilewise {
namespace {

template <class T, class Operands = Bf16Operands<T>>
class TileAttention : public RowsOnTiles<T, Operands> {
  using Base = RowsOnTiles<T, Operands>;

 public:
  using Base::P, Base::columns;

  // `rows` in all, in tiles of 32; blocks of keys that divide, or are divided by, `key_step` if possible, of `keys`
  // keys or (0) as fit the L1 cache.
  TileAttention(int dim, int v_dim, float scale_log2, int rows, int key_step = kTileDepth, int keys = 0)
      : Base(dim, v_dim, scale_log2, Base::in_step(keys ? keys : block_keys(dim, v_dim, rows), key_step)) {}

  // Bytes of workspace for `tiles` tiles of rows, 64-byte aligned.
  int64_t bytes(int tiles) const {
    return (max_of(key_size(), value_size()) + tiles * weight_size()) * sizeof(Packed) +
           2 * kMaxRows * keys_ * sizeof(float);
  }
  void use(void* memory) {
    block_ = static_cast<Packed*>(memory);
    scores_ = reinterpret_cast<float*>(block_ + max_of(key_size(), value_size()));
    weights_ = reinterpret_cast<Packed*>(scores_ + 2 * kMaxRows * keys_);
  }

  // How often a block of `keys` keys and `rows` rows calls plan.meanwhile().
  static int64_t calls(int rows, int keys) { return rows; }

  // Adds a block of `keys` keys, whose rows k(i) and v(i) give, to tiles of rows. plan.rows(t) says how many rows tile
  // t has, plan.keys(t) how many of the block's keys it needs, and plan.see(t, f) calls f with the policy that says
  // what its rows see.
  //
  // First the weights of all tiles, then what they add: so only the keys or the values, packed, take room in the L1
  // cache. The products of the next tile's scores are taken between the rows of one tile's weights.
  template <class KRow, class VRow, class Plan>
  void add_block(AttentionRows* tiles, int count, const KRow& k, const VRow& v, int keys, const Plan& plan) {
    this->pack_keys(block_, tiles, k, keys);
    int t = next_tile(count, plan, 0);
    if (t < count) plan.rows(t) > kTileRows ? score<2>(tiles[t], plan.keys(t)) : score<1>(tiles[t], plan.keys(t));
    for (int turn = 0; t < count; turn ^= 1) {
      const int next = next_tile(count, plan, t + 1);
      Scoring scoring = scores_of(tiles, count, plan, next, turn ^ 1);
      plan.see(t,
               [&](const auto& visible) { weigh(tiles[t], scores(turn), weights_of(t), plan, t, visible, scoring); });
      t = next;
    }
    this->pack_values(block_, tiles, count, plan, v, keys);
    for_tiles(count, plan,
              [&](auto m, int t) { add_values<decltype(m)::value>(tiles[t], weights_of(t), plan.keys(t)); });
  }

 private:
  using Base::dim_, Base::v_dim_, Base::keys_, Base::q_, Base::v_;
  using Base::key_size, Base::value_size, Base::padded;

  static constexpr int kMaxRows = 2 * kTileRows;
  Packed *block_, *weights_;  // keys, then values; [tile] weights
  float* scores_;             // of two tiles in turn: [row][keys_]

  // For a single tile of 16 rows the L1 cache does not matter, nothing is used twice: four columns of tiles are best.
  static int block_keys(int dim, int v_dim, int rows) {
    return rows <= kTileRows ? 2 * kTileDepth : Base::keys_in_cache(dim, v_dim);
  }
  int64_t weight_size() const { return v_.at(kMaxRows / kTileRows, 0, 0); }

  Packed* weights_of(int t) const { return weights_ + t * weight_size(); }

  // f(tiles of 16 rows, tile) for every tile that needs some key.
  template <class Plan, class F>
  static void for_tiles(int count, const Plan& plan, const F& f) {
    for (int t = 0; t < count; t++) {
      if (plan.keys(t) <= 0) continue;
      plan.rows(t) > kTileRows ? f(Count<2>(), t) : f(Count<1>(), t);
    }
  }

  float* scores(int turn) const { return scores_ + turn * kMaxRows * keys_; }

  using Scoring = MultiplyInSteps<P, typename Operands::Products>;
  template <class Plan>
  static int next_tile(int count, const Plan& plan, int t) {
    while (t < count && plan.keys(t) <= 0) t++;
    return t;
  }
  template <class Plan>
  Scoring scores_of(const AttentionRows* tiles, int count, const Plan& plan, int t, int turn) const {
    if (t >= count) return {};
    const int m = plan.rows(t) > kTileRows ? 2 : 1, columns = padded(plan.keys(t)) / kTileRows;
    return {m, run_of(tiles[t].q, q_, 0), block_, q_, columns, scores(turn), keys_};
  }
  template <int M>
  void score(const AttentionRows& tile, int keys) const {
    multiply_columns<P, M, typename Operands::Products>(run_of(tile.q, q_, 0), block_, q_, padded(keys) / kTileRows,
                                                        q_.steps, scores_, keys_, false);
  }
  template <int M>
  void add_values(const AttentionRows& tile, const Packed* weights, int keys) const {
    multiply_columns<P, M, typename Operands::Products>(run_of(weights, v_, 0), block_, v_, columns() / kTileRows,
                                                        padded(keys) / kTileDepth, tile.out, columns(), true);
  }

  template <class Plan, class Visible>
  void weigh(AttentionRows& tile, const float* scores, Packed* weights, const Plan& plan, int t, const Visible& visible,
             Scoring& scoring) {
    const int end = padded(plan.keys(t)), rows = plan.rows(t), steps = scoring.steps();
    int due = 0;
    for (int i = 0; i < rows; i++, scores += keys_) {
      plan.meanwhile();
      for (due += steps; due >= rows; due -= rows) scoring.take(1);
      if (!tile.started) this->set_reference(tile, i, scores, end, visible);
      if (!weigh_row(tile, i, scores, weights, end, visible, kMostWeight)) {
        this->raise_reference(tile, i, scores, end, visible);
        weigh_row(tile, i, scores, weights, end, visible, kInfinity);
      }
    }
    tile.started = true;
  }

  // Weights of row i, in parts; false, and nothing summed, where a lane has more than `most`. A NaN makes the sum, and
  // by that the result, NaN.
  template <class Visible>
  TILEWISE_INLINE bool weigh_row(AttentionRows& tile, int i, const float* scores, Packed* weights, int end,
                                 const Visible& visible, float most) const {
    Packed* to = weights + v_.at(i / kTileRows, 0, 0) + i % kTileRows * kTileDepth;
    const auto row = this->scale_of_row(tile, i);
    VF sum_low = {}, sum_high = {};
    for (int key = 0; key < end; key += kTileDepth, to += kTileSize) {
      VF low, high;
      this->weigh_keys(row, scores + key, key, FastExp2(), visible, low, high, to);
      sum_low += low;
      sum_high += high;
    }
    const VF sum = sum_low + sum_high;
    if (any(sum > set1(most))) return false;
    store(tile.sums + i * W, load(tile.sums + i * W) + sum);
    return true;
  }
};

}  // namespace
}  // namespace tilewise
