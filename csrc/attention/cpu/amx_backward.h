// Backward on AMX tiles. Rows are queries, as in the forward, and S = Q K^T is the very product of the forward: float32
// recomputes its scores bit by bit, so that their errors cancel those in lse.
//
// A unit is 32 queries by 32 keys. Its P and dS leave the vector registers as right operands (terms are queries) of the
// transposed products dV^T = dO^T P and dK^T = Q^T dS, and dS also as left operand of dQ = dS K: nothing is transposed
// but queries, once for all keys, and the gradients, once.
#pragma once
#include "attention/cpu/amx.h"
#include "attention/cpu/amx_gradients.h"
#include "attention/cpu/backward.h"

namespace tilewise {
namespace {

constexpr int kUnit = kTileDepth;  // queries, and keys, of a unit
constexpr int kGroupTiles = 4;     // tiles of queries that pass over the keys together: terms of dV and dK
constexpr int kBlockUnits = 4;     // units of keys of a block: terms of dQ
constexpr int kGroupQueries = kGroupTiles * kUnit, kBlockKeys = kBlockUnits * kUnit;
constexpr int kUnitSize = kUnit * kUnit;
constexpr int64_t kChunkBytes = 1024 * 1024;  // of packed keys and values, about: they stay in the L2 cache

// Hands out pieces of one scratch buffer, 64-byte aligned; without one it only measures.
struct Pieces {
  uintptr_t memory;
  int64_t used = 0;
  template <class U>
  void take(U*& piece, int64_t count) {
    piece = reinterpret_cast<U*>(memory + used);
    used += round_up(count * sizeof(U), 64);
  }
};

// One score's place in a unit, and what its weight and gradient come from: in base 2, apart from dp and delta. A weight
// is at most 2^most, but for rounding.
struct ScoreTerms {
  VF score, lse, lse_rest, dp, delta;
  int row, key, most;
};
struct WeightAndGradient {
  VF p, ds;
};
template <class Visible>
TILEWISE_INLINE WeightAndGradient differentiate_score(const Visible& visible, const ScoreTerms& at) {
  const VF weight = fast_exp2(visible.hide(at.score - at.lse - at.lse_rest, at.row, at.key));
  return {weight, weight * (at.dp - at.delta)};
}
TILEWISE_INLINE WeightAndGradient differentiate_score(const Ruled& to, const ScoreTerms& at) {
  VF score = at.score, slope = set1(1), dp = at.dp;
  if (to.rules.caps()) score = to.rules.cap(score, slope);
  // Above lse only by rounding, which is large where all scores of a row are.
  const VF power = min(set1(1 + at.most), to.adjusted(score, at.row, at.key) - at.lse - at.lse_rest);
  const VF weight = fast_exp2(power);
  VF met = weight;
  if (to.rules.drops()) {
    met = to.keep(met, at.row, at.key);
    dp = to.keep(dp, at.row, at.key);
  }
  return {met, weight * (dp - at.delta) * slope};
}

template <class T, class ForwardOperands>
class TileGradients {
  using Operands = GradientOperands<ForwardOperands>;
  using Element = typename Operands::Element;
  using Products = typename Operands::Products;

 public:
  static constexpr int P = Operands::kParts;

  TileGradients(const BackwardParams& b, const KeyRun& run)
      : b_(b),
        p_(b.forward),
        run_(run),
        ruled_(!causal_or_dense(p_.rules)),
        dim_(static_cast<int>(round_up(p_.dim, kUnit))),
        v_dim_(static_cast<int>(round_up(p_.v_dim, kUnit))),
        chunk_keys_(static_cast<int>(min_of(chunk_keys(p_), round_up(run.keys, kBlockKeys)))),
        by_dim_{dim_ / kUnit},
        by_v_dim_{v_dim_ / kUnit} {
    if (Operands::kRanged) scales_.fit_weights(HeadRules(p_, run.seq, 0).keep_scale());
  }

  // Keys that are packed at a time. Each time the queries are packed anew, and dq is added to.
  static int64_t chunk_keys(const ForwardParams& p) {
    const int64_t key_bytes = P * (2 * round_up(p.dim, kUnit) + round_up(p.v_dim, kUnit)) * sizeof(Packed);
    return max_of<int64_t>(kChunkBytes / key_bytes / kBlockKeys, 1) * kBlockKeys;
  }

  int64_t bytes() { return use(nullptr); }
  int64_t use(void* memory) {
    Pieces pieces{reinterpret_cast<uintptr_t>(memory)};
    pieces.take(k_, by_dim_.at(chunk_keys_ / kTileRows, 0, 0));
    pieces.take(v_, by_v_dim_.at(chunk_keys_ / kTileRows, 0, 0));
    pieces.take(k_rows_, chunk_keys_ / kBlockKeys * k_rows_size());
    pieces.take(dk_, int64_t(chunk_keys_) * dim_);
    pieces.take(dv_, int64_t(chunk_keys_) * v_dim_);
    pieces.take(q_, by_dim_.at(kGroupQueries / kTileRows, 0, 0));
    pieces.take(dout_, by_v_dim_.at(kGroupQueries / kTileRows, 0, 0));
    pieces.take(q_turned_, kByQuery.at(dim_ / kTileRows, 0, 0));
    pieces.take(dout_turned_, kByQuery.at(v_dim_ / kTileRows, 0, 0));
    pieces.take(dq_, kGroupQueries * dim_);
    pieces.take(p_right_, kByQuery.at(kBlockKeys / kTileRows, 0, 0));
    pieces.take(ds_right_, kByQuery.at(kBlockKeys / kTileRows, 0, 0));
    pieces.take(ds_left_, kByKey.at(2, 0, 0));
    pieces.take(scores_, kUnitSize);
    pieces.take(dp_, kUnitSize);
    pieces.take(lse_, kGroupQueries);
    pieces.take(lse_rest_, kGroupQueries);
    pieces.take(delta_, kGroupQueries);
    return pieces.used;
  }

  // False where some result is not finite: infinite inputs may have met parts that are zero and have become NaN, and a
  // kernel that does not split its operands has to decide.
  bool compute() {
    const TileScope scope;
    const int64_t group = p_.q_heads / p_.kv_heads;
    int begin = 0;
    do {
      const int keys = min_of(chunk_keys_, run_.keys - begin);
      pack_keys(begin, keys);
      fill(dk_, round_up(keys, kUnit) * dim_, 0);
      fill(dv_, round_up(keys, kUnit) * v_dim_, 0);
      // Later keys of the run, as later runs, start where they come into sight.
      const int64_t sighted = max_of<int64_t>(0, run_.first_key + begin - diagonal_of(p_, run_.seq));
      const int64_t first_query = (begin == 0 ? run_.first_query(p_) : sighted) / kUnit * kUnit;
      for (int64_t head = run_.kv_head * group; head < (run_.kv_head + 1) * group; head++)
        for (int64_t q = first_query; q < run_.seq.queries; q += kGroupQueries)
          add_queries(head, static_cast<int>(q), begin, keys);
      store_keys(b_.dk, b_.dk_strides, dk_, begin, keys, p_.dim, set1(p_.scale * scales_.ds_unit()));
      store_keys(b_.dv, b_.dv_strides, dv_, begin, keys, p_.v_dim, set1(scales_.weight_unit()));
      begin += keys;
    } while (begin < run_.keys);
    return !any(not_finite_ != not_finite_);
  }

 private:
  // One step more than is used: tiles and parts 4 KB apart would meet in the same sets of the L1 cache.
  static constexpr TileLayout<P> kByQuery{kGroupTiles + 1}, kByKey{kBlockUnits + 1};

  const BackwardParams& b_;
  const ForwardParams& p_;
  const KeyRun& run_;
  bool ruled_;
  int dim_, v_dim_;  // whole units
  int chunk_keys_;
  TileLayout<P> by_dim_, by_v_dim_;
  VF not_finite_ = {};  // NaN from the first infinity or NaN on
  GradientScales scales_;
  float v_square_ = 0;  // the largest square of a packed value, where scales depend on it

  Packed *k_, *v_;                   // right operands of S and dP
  Packed* k_rows_;                   // [block]: right operands of dQ
  Packed *q_, *dout_;                // left operands of S and dP
  Packed *q_turned_, *dout_turned_;  // left operands of dK^T and dV^T
  Packed *p_right_, *ds_right_;      // P and dS of the group and a block of keys
  Packed* ds_left_;                  // dS of a tile of queries and a block of keys
  float *dk_, *dv_;                  // [unit of keys][d][key], transposed
  float* dq_;                        // [query of the group][d]
  float *scores_, *dp_;              // [query][key] of a unit
  float *lse_, *lse_rest_, *delta_;  // [query of the group]: lse in base 2, and what its rounding lost

  int64_t k_rows_size() const { return kByKey.at(dim_ / kTileRows, 0, 0); }

  auto rows_of(const void* base, const Strides& strides, int64_t head, int64_t first) const {
    const T* row = row_of<const T>(base, strides, run_.seq.batch, head, first);
    return [row, step = strides.row](int64_t i) { return row + i * step; };
  }
  auto elements_of(const void* base, const Strides& strides, int64_t head, int64_t first) const {
    return Operands::rows(rows_of(base, strides, head, first));
  }

  void pack_keys(int begin, int keys) {
    const int64_t at = run_.seq.k_row + run_.first_key + begin;
    const int padded = static_cast<int>(round_up(keys, kUnit));
    const auto k = elements_of(p_.k, p_.k_strides, run_.kv_head, at);
    const auto v = elements_of(p_.v, p_.v_strides, run_.kv_head, at);
    pack_right_transposed<Element>(k_, by_dim_, k, keys, padded, p_.dim);
    pack_right_transposed<Element>(v_, by_v_dim_, v, keys, padded, p_.v_dim);
    for (int key = 0; key < keys; key += kBlockKeys)
      pack_right<Element>(k_rows_ + key / kBlockKeys * k_rows_size(), kByKey,
                          elements_of(p_.k, p_.k_strides, run_.kv_head, at + key), min_of(keys - key, kBlockKeys),
                          min_of(padded - key, kBlockKeys), p_.dim);
    if (Operands::kRanged) v_square_ = largest_square(rows_of(p_.v, p_.v_strides, run_.kv_head, at), keys, p_.v_dim);
  }

  // Of a query's dO, a value V of its P V and delta, dS / P is at most |dO| |V| + |delta|.
  void fit_scales(int64_t head, int begin, int count, int keys) {
    const int64_t at = run_.seq.q_row + begin;
    const float square = largest_square(rows_of(b_.dout, b_.dout_strides, head, at), count, p_.v_dim);
    const float* delta = row_of<const float>(b_.delta, statistics_strides(p_), run_.seq.batch, head, at);
    float most = 0;
    for (int i = 0; i < count; i++) most = max_of(most, __builtin_fabsf(delta[i]));
    most += __builtin_sqrtf(square) * __builtin_sqrtf(v_square_) * HeadRules(p_, run_.seq, head).keep_scale();
    const float change = scales_.fit_gradients(most);
    if (change == 1) return;
    for (int64_t i = 0; i < round_up(keys, kUnit) * dim_; i += W) store(dk_ + i, load(dk_ + i) * change);
  }

  // Tile t of the group: `count` queries from `row` on.
  void pack_queries(int t, int64_t head, int row, int count) {
    const int64_t at = run_.seq.q_row + row;
    const auto q = elements_of(p_.q, p_.q_strides, head, at);
    const auto dout = elements_of(b_.dout, b_.dout_strides, head, at);
    pack_left<Element>(q_ + by_dim_.at(2 * t, 0, 0), by_dim_, q, count, kUnit, p_.dim);
    pack_left<Element>(dout_ + by_v_dim_.at(2 * t, 0, 0), by_v_dim_, dout, count, kUnit, p_.v_dim);
    pack_left_transposed<Element>(q_turned_, kByQuery, t, q, count, p_.dim);
    pack_left_transposed<Element>(dout_turned_, kByQuery, t, dout, count, p_.v_dim);
    const Strides statistics = statistics_strides(p_);
    const float* lse = row_of<const float>(p_.lse, statistics, run_.seq.batch, head, at);
    const float* delta = row_of<const float>(b_.delta, statistics, run_.seq.batch, head, at);
    for (int i = 0, to = t * kUnit; i < kUnit; i++, to++) {
      // An infinite lse makes every probability zero: padding, and queries that see no key.
      const bool seen = i < count && lse[i] != -kInfinity;
      const double exact = seen ? double(lse[i]) * kLog2e - scales_.weight_power : 0;
      lse_[to] = seen ? static_cast<float>(exact) : kInfinity;
      lse_rest_[to] = seen ? static_cast<float>(exact - lse_[to]) : 0;
      delta_[to] = i < count ? delta[i] * scales_.ds : 0;
    }
  }

  // Up to kGroupQueries queries from `begin` on and all keys of the chunk, which starts at `first_key` of the run.
  void add_queries(int64_t head, int begin, int first_key, int keys) {
    const int count = min_of(kGroupQueries, run_.seq.queries - begin);
    const int tiles = static_cast<int>(ceil_div(count, kUnit));
    if (Operands::kRanged) fit_scales(head, begin, count, keys);
    for (int t = 0; t < tiles; t++) pack_queries(t, head, begin + t * kUnit, min_of(kUnit, count - t * kUnit));
    fill(dq_, int64_t(tiles) * kUnit * dim_, 0);
    if (ruled_)
      add_ruled_keys(head, begin, count, first_key, keys);
    else
      add_keys(begin, count, first_key, keys);
    store_queries(head, begin, count, first_key > 0);
  }

  void add_keys(int begin, int count, int first_key, int keys) {
    // Query i of the group sees the keys of the chunk below first + i.
    const int64_t first = begin + diagonal_of(p_, run_.seq) - run_.first_key - first_key + 1;
    const int64_t end = min_of<int64_t>(keys, first + count - 1);
    for (int key = 0; key < end; key += kBlockKeys)
      add_block(count, key, static_cast<int>(min_of<int64_t>(kBlockKeys, end - key)), SeenByDiagonal{first - key});
  }

  void add_ruled_keys(int64_t head, int begin, int count, int first_key, int keys) {
    const HeadRules rules(p_, run_.seq, head);
    const int64_t start = run_.first_key + first_key, end = start + keys;
    for (int64_t key = start; (key = rules.next_seen(begin, begin + count - 1, key)) < end; key += kBlockKeys) {
      key -= (key - start) % kBlockKeys;
      const int at = static_cast<int>(key - start);
      add_block(count, at, min_of(kBlockKeys, keys - at), SeenByRules{rules, begin, key});
    }
  }

  // Query i of the group sees the keys of the block below first + i.
  struct SeenByDiagonal {
    int64_t first;
    Sight operator()(int t, int rows, int u, int) const {
      return first + t * kUnit + rows - 1 > u * kUnit ? Sight::some : Sight::none;
    }
    template <class F>
    void see(int t, int u, int keys, Sight, const F& f) const {
      const int64_t from = first + t * kUnit - u * kUnit;
      if (from >= kUnit && keys == kUnit)
        f(SeesAll());
      else
        f(SeesUpTo{from, keys});
    }
  };
  // Of the group from `row` on and the block from `key` on.
  struct SeenByRules {
    const HeadRules& rules;
    int64_t row, key;
    Sight operator()(int t, int rows, int u, int keys) const {
      const int64_t first = row + t * kUnit, from = key + u * kUnit;
      return rules.over(first, first + rows - 1, from, from + keys);
    }
    template <class F>
    void see(int t, int u, int keys, Sight sight, const F& f) const {
      const bool masked = sight != Sight::all || rules.adds() || keys < kUnit;
      if (!masked && !rules.changes_scores() && !rules.drops()) return f(SeesAll());
      int32_t kept[kKeptRows];
      if (rules.drops()) kept_bits(rules, row + t * kUnit, key + u * kUnit, kept);
      f(Ruled{rules, row + t * kUnit, key + u * kUnit, masked, kept});
    }
  };

  // One block: `keys` keys from `key` of the chunk on; seen(t, rows, u, keys) says what tile t sees of unit u.
  template <class Seen>
  void add_block(int count, int key, int keys, const Seen& seen) {
    const int tiles = static_cast<int>(ceil_div(count, kUnit)), units = static_cast<int>(ceil_div(keys, kUnit));
    auto keys_of = [&](int u) { return min_of(kUnit, keys - u * kUnit); };
    Sight sights[kGroupTiles][kBlockUnits];
    Extent of_tile[kGroupTiles], of_unit[kBlockUnits];  // units that a tile sees, tiles that see a unit
    for (int t = 0; t < tiles; t++)
      for (int u = 0; u < units; u++) {
        sights[t][u] = seen(t, min_of(kUnit, count - t * kUnit), u, keys_of(u));
        if (sights[t][u] == Sight::none) continue;
        of_tile[t].include(u);
        of_unit[u].include(t);
      }
    for (int t = 0; t < tiles; t++) {
      for (int u = 0; u < units; u++) {
        if (sights[t][u] == Sight::none) {
          if (of_tile[t].has(u) || of_unit[u].has(t)) clear_unit(t, u);
          continue;
        }
        multiply_unit(t, key + u * kUnit);
        seen.see(t, u, keys_of(u), sights[t][u], [&](const auto& visible) { differentiate(t, u, visible); });
      }
      add_dq(t, of_tile[t], key);
    }
    for (int u = 0; u < units; u++) {
      const int64_t at = key + u * kUnit;
      add_turned(dout_turned_, p_right_, u, of_unit[u], dv_ + at * v_dim_, v_dim_);
      add_turned(q_turned_, ds_right_, u, of_unit[u], dk_ + at * dim_, dim_);
    }
  }

  struct Extent {
    int begin = 0, end = 0;
    void include(int i) {
      if (begin == end) begin = i;
      end = i + 1;
    }
    bool has(int i) const { return begin <= i && i < end; }
  };

  // S and dP of tile t of the group and the unit of keys that starts at `key` of the chunk.
  void multiply_unit(int t, int key) const {
    multiply_packed<P, 2, 2, Products>(run_of(q_, by_dim_, 2 * t), run_of(k_, by_dim_, key / kTileRows), by_dim_.steps,
                                       scores_, kUnit, false);
    multiply_packed<P, 2, 2, Products>(run_of(dout_, by_v_dim_, 2 * t), run_of(v_, by_v_dim_, key / kTileRows),
                                       by_v_dim_.steps, dp_, kUnit, false);
  }

  void add_dq(int t, const Extent& units, int key) const {
    if (units.begin == units.end) return;
    const Packed* k = k_rows_ + key / kBlockKeys * k_rows_size() + units.begin * kTileSize;
    multiply_columns<P, 2, Products>(run_of(ds_left_ + units.begin * kTileSize, kByKey, 0), k, kByKey, dim_ / kTileRows,
                                     units.end - units.begin, dq_ + t * kUnit * dim_, dim_, true);
  }

  // What an unseen unit leaves between seen ones.
  void clear_unit(int t, int u) const {
    const Halves nothing[2][P] = {};
    for (int i = 0; i < kTileRows; i++) {
      store_pairs(p_right_, t, u, i, nothing);
      store_pairs(ds_right_, t, u, i, nothing);
      store_rows(u, i, nothing);
    }
  }

  template <class Visible>
  void differentiate(int t, int u, const Visible& visible) const {
    const VF scale = set1(static_cast<float>(p_.scale * kLog2e)), ds_scale = set1(scales_.ds);
    for (int i = 0; i < kTileRows; i++) {
      VF p[2][2], ds[2][2];
#pragma GCC unroll 4
      for (int at = 0; at < 4; at++) {
        const int row = i + at / 2 * kTileRows, column = at % 2 * W, query = t * kUnit + row;
        VF dp = load(dp_ + row * kUnit + column);
        if (Operands::kRanged) dp *= ds_scale;
        const WeightAndGradient found =
            differentiate_score(visible, {load(scores_ + row * kUnit + column) * scale, set1(lse_[query]),
                                          P == 3 ? set1(lse_rest_[query]) : VF{}, dp, set1(delta_[query]), row, column,
                                          scales_.weight_power});
        p[at / 2][at % 2] = found.p;
        ds[at / 2][at % 2] = found.ds;
      }
      Halves rows[2][P], pairs[2][P];
      Operands::split_square(p, rows, pairs);
      store_pairs(p_right_, t, u, i, pairs);
      Operands::split_square(ds, rows, pairs);
      store_pairs(ds_right_, t, u, i, pairs);
      store_rows(u, i, rows);
    }
  }
  TILEWISE_INLINE void store_rows(int u, int i, const Halves (&rows)[2][P]) const {
#pragma GCC unroll 6
    for (int at = 0; at < 2 * P; at++)
      _mm512_store_si512(ds_left_ + kByKey.at(at / P, at % P, u) + i * kTileDepth, rows[at / P][at % P]);
  }
  TILEWISE_INLINE static void store_pairs(Packed* to, int t, int u, int i, const Halves (&pairs)[2][P]) {
#pragma GCC unroll 6
    for (int at = 0; at < 2 * P; at++)
      _mm512_store_si512(to + kByQuery.at(2 * u + at / P, at % P, t) + i * kTileDepth, pairs[at / P][at % P]);
  }

  // c[d][key of unit u] += sum over the queries of `tiles` of left[d][query] * right[query][key].
  static void add_turned(const Packed* left, const Packed* right, int u, const Extent& tiles, float* c, int dim) {
    const Packed *from = left + tiles.begin * kTileSize, *weights = right + tiles.begin * kTileSize;
    if (tiles.begin < tiles.end)
      for (int d = 0; d < dim; d += kUnit)
        multiply_packed<P, 2, 2, Products>(run_of(from, kByQuery, d / kTileRows), run_of(weights, kByQuery, 2 * u),
                                           tiles.end - tiles.begin, c + d * kUnit, kUnit, true);
  }

  // The columns [d, d + 32) of a row, n of which exist.
  template <class U>
  TILEWISE_INLINE void store_unit(U* to, VF low, VF high, VF scale, int n, bool add) {
    natural_columns<P>(low, high);
    store_some(to, low * scale, n, add);
    if (n > W) store_some(to + W, high * scale, n - W, add);
  }
  template <class U>
  TILEWISE_INLINE void store_some(U* to, VF value, int n, bool add) {
    const int lanes = min_of(n, W);
    not_finite_ += select(first_lanes(lanes), value, VF{}) * 0.f;
    if (add) value += load(to, lanes);
    store(to, value, lanes);
  }

  void store_queries(int64_t head, int begin, int count, bool add) {
    for (int i = 0; i < count; i++) {
      T* dq = row_of<T>(b_.dq, b_.dq_strides, run_.seq.batch, head, run_.seq.q_row + begin + i);
      for (int d = 0; d < p_.dim; d += kUnit) {
        const float* from = dq_ + i * dim_ + d;
        const VF low = load(from), high = load(from + W), scale = set1(p_.scale * scales_.ds_unit());
        if (run_.partial)
          store_unit(run_.partial_row(p_, head, begin + i) + d, low, high, scale, p_.dim - d, add);
        else
          store_unit(dq + d, low, high, scale, p_.dim - d, false);
      }
    }
  }

  void store_keys(void* base, const Strides& strides, const float* turned, int begin, int keys, int dim, VF scale) {
    T* to = row_of<T>(base, strides, run_.seq.batch, run_.kv_head, run_.seq.k_row + run_.first_key + begin);
    const int64_t unit_size = round_up(dim, kUnit) * kUnit;
    for (int key = 0; key < round_up(keys, kUnit); key += W)
      for (int d = 0; d < dim; d += kUnit) {
        const float* from = turned + key / kUnit * unit_size + d * kUnit + key % kUnit;
        VF low[W], high[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) low[i] = load(from + i * kUnit), high[i] = load(from + (W + i) * kUnit);
        transpose(low);
        transpose(high);
        for (int i = 0; i < W; i++) {
          const int row = key / kUnit * kUnit + natural_column<P>(key % kUnit + i);
          if (row < keys) store_unit(to + row * strides.row + d, low[i], high[i], scale, dim - d, false);
        }
      }
  }
};

template <class T, class Operands>
const char* backward_tiles(const BackwardParams& b, const Runtime& rt) {
  using Gradients = TileGradients<T, Operands>;
  const Split split = split_keys(b.forward, kBlockKeys);
  const bool chunks = split.keys > Gradients::chunk_keys(b.forward);
  const char* failure = run_backward<T>(b, rt, split, chunks, [&](const KeyRun& run) {
    if (run.seq.queries < kMinTileQueries || too_alike<T>(b.forward)) return backward_task<T>(b, rt, run);
    Gradients gradients(b, run);
    char* memory = scratch<char>(rt, kTaskScratch, gradients.bytes());
    if (!memory) return false;
    gradients.use(memory);
    return gradients.compute() || backward_task<T>(b, rt, run);
  });
  return failure ? failure : option_gradients<T>(b, rt);
}

const char* backward_on_tiles(const BackwardParams& b, const Runtime& rt) {
  return with_operands(b.forward.type, rt, [&](auto element, auto operands) {
    return backward_tiles<decltype(element), decltype(operands)>(b, rt);
  });
}

}  // namespace
}  // namespace tilewise
