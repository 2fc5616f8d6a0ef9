// What attention on AMX tiles has in common, whichever order its work is done in (tile_attention.h, tile_overlap.h):
// what a row may see, how operands become tiles, and the running result of a row, with its reference score.
#pragma once
#include "common/half_tiles.h"
#include "common/softmax.h"

namespace tilewise {
namespace {

constexpr int kMaxBlockKeys = 96;
constexpr float kFloatMost = 3.402823466e38f, kLowestReference = -kFloatMost;
// Weights are taken relative to a reference score, not to the running maximum: exact while no score exceeds it by more
// than kReferenceSlack (in powers of two) or, as told here, while no lane of a row sums more weight than kMostWeight.
// Then that row's reference is raised and its block done again.
constexpr float kReferenceSlack = 16.f, kMostWeight = 65504.f;  // as much as fp16 holds

// 2^t for t <= 127, and 0 for -inf: within 8e-8, on both sides of the true value, so that sums do better.
TILEWISE_INLINE VF fast_exp2(VF t) {
  constexpr int kDown = 0x09;  // towards -inf, raising no exception
  const VF f = (VF)_mm512_reduce_ps((__m512)t, kDown);
  VF p = set1(1.877576673e-3f);
  p = p * f + 8.989340095e-3f;
  p = p * f + 5.582631805e-2f;
  p = p * f + 2.401536170e-1f;
  p = p * f + 6.931530732e-1f;
  p = p * f + 9.999999251e-1f;
  return (VF)_mm512_scalef_ps((__m512)p, (__m512)t);
}
struct FastExp2 {
  TILEWISE_INLINE VF operator()(VF t) const { return fast_exp2(t); }
};

// ---- which of the keys [key, key + 16) of the block row i of the tile sees ----
struct SeesAll {
  TILEWISE_INLINE VF hide(VF score, int, int) const { return score; }
};
// Row i sees the keys below first + i, and none from `count` on.
struct SeesUpTo {
  int64_t first;
  int count;
  TILEWISE_INLINE VF hide(VF score, int row, int key) const {
    const int64_t end = min_of<int64_t>(first + row, count) - key;
    return select(iota() < set1i(int32_t(max_of<int64_t>(end, 0))), score, set1(-kInfinity));
  }
};

// Row i is row i + `skipped` of those of which `step` in turn see the same.
struct SeesInSteps {
  int64_t first;
  int count, step, skipped;
  TILEWISE_INLINE VF hide(VF score, int row, int key) const {
    return SeesUpTo{first, count}.hide(score, (row + skipped) / step, key);
  }
};

// What a policy may do beside hiding, by overloads: change scores, here those relative to `reference`, and the weights
// that meet values, though not their sum.
template <class Visible>
TILEWISE_INLINE VF seen_score(const Visible& visible, VF score, VF reference, int row, int key) {
  return visible.hide(score - reference, row, key);
}
template <class Visible>
TILEWISE_INLINE VF met_weight(const Visible&, VF weight, int, int) {
  return weight;
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// How operands become tiles. Numbers in bf16 parts have float32's range, and no scales.
template <class T>
struct Bf16Operands {
  using Element = T;  // of what rows() gives, which is what is packed
  static constexpr int kParts = tilewise::kParts<T>, kColumnOrder = kParts;
  static constexpr bool kScaled = false, kPeakFirst = false;
  static constexpr float kHeadroom = 0;
  using Products = PartProducts<kParts>;
  using Layout = TileLayout<kParts>;

  template <class Row>
  static void pack_queries(Packed* to, float*, const Layout& layout, const Row& row, int count, int padded, int dim) {
    pack_left<T>(to, layout, row, count, padded, dim);
  }
  template <class Row>
  static const Row& rows(const Row& row) {
    return row;
  }
  static TILEWISE_INLINE void split_weights(VF low, VF high, Halves (&parts)[kParts]) { split(low, high, parts); }
};
// float32 in fp16 parts. Weights keep away from fp16's lower end: the reference is below the score it was taken from.
struct Fp16Operands {
  static constexpr int kParts = 2, kColumnOrder = 1;
  static constexpr bool kScaled = true, kPeakFirst = false;
  static constexpr float kHeadroom = 7;  // in powers of two
  using Products = HalfProducts<2>;
  using Layout = HalfLayout;

  template <class Row>
  static void pack_queries(Packed* to, float* units, const Layout& layout, const Row& row, int count, int padded,
                           int dim) {
    pack_left_halves(to, units, layout, row, count, padded, dim);
  }
  static TILEWISE_INLINE void split_weights(VF low, VF high, Halves (&parts)[2]) { split_halves(low, high, parts); }
};
// fp16 as it is: 16 bits that move as those of bf16 do. Weights are rounded once; none that is summed exceeds
// kMostWeight. Where a row's reference comes from its largest score, the weight of that has no rounding: what few keys
// make is then as good as its own.
struct NativeFp16Operands {
  using Element = Bf16;
  static constexpr int kParts = 1, kColumnOrder = 1;
  static constexpr bool kScaled = false, kPeakFirst = true;
  static constexpr float kHeadroom = Fp16Operands::kHeadroom;
  using Products = HalfProducts<1>;
  using Layout = TileLayout<1>;

  template <class Row>
  static auto rows(const Row& row) {
    return [row](int64_t i) { return reinterpret_cast<const Element*>(row(i)); };
  }
  template <class Row>
  static void pack_queries(Packed* to, float*, const Layout& layout, const Row& row, int count, int padded, int dim) {
    pack_left<Element>(to, layout, rows(row), count, padded, dim);
  }
  static TILEWISE_INLINE void split_weights(VF low, VF high, Halves (&parts)[1]) { split_halves(low, high, parts); }
};

// A tile of up to 32 rows and their running results.
struct AttentionRows {
  const Packed* q;   // packed left operand
  float* out;        // [row][columns], not normalised
  float* sums;       // [row][W]: of weights, to be added up at the end
  float* reference;  // [row], in powers of two
  bool started;
  float* units = nullptr;  // [row], of scaled queries: what one is worth
  float key_scale = 0;     // of scaled keys; 0: none yet
  float value_scale = 0;   // of scaled values, and by that of `out`; 0: none yet
  int first = 0;           // what policies call the first row
};

// The operands of a block, in tiles, and the results of rows. `keys`: of a block, at most.
template <class T, class Operands>
class RowsOnTiles {
 public:
  static constexpr int P = Operands::kParts;

  int keys() const { return keys_; }  // of a block, at most
  int columns() const { return static_cast<int>(round_up(v_dim_, kTileDepth)); }
  int64_t query_size(int rows) const { return q_.at(rows / kTileRows, 0, 0); }  // Packed elements

  // `units`: [padded], if operands are scaled.
  template <class Row>
  void pack_queries(Packed* to, const Row& row, int count, int padded, float* units = nullptr) const {
    Operands::pack_queries(to, units, q_, row, count, padded, dim_);
  }

  // Whether the result of `count` rows is finite. Where it is not, infinite inputs may have met parts that are zero and
  // have become NaN, and a kernel that does not split its operands has to decide.
  bool finite(const AttentionRows& rows, int count) const {
    VF zero = {};  // NaN from the first infinity or NaN on
    for (int i = 0; i < count * columns(); i += W) zero += load(rows.out + i) * 0.f;
    for (int i = 0; i < count; i++) zero += load(rows.sums + i * W) * 0.f;
    return !any(zero != zero);
  }

  // Hands the columns of one row, W at a time, to take(first column, values).
  template <class Take>
  void read_row(const AttentionRows& rows, int i, const Take& take) const {
    for (int d = 0; d < columns(); d += kTileDepth) {
      const float* from = rows.out + i * columns() + d;
      VF low = load(from), high = load(from + W);
      if constexpr (Operands::kScaled) low *= 1 / scale_of(rows.value_scale), high *= 1 / scale_of(rows.value_scale);
      natural_columns<Operands::kColumnOrder>(low, high);
      take(d, low);
      if (d + W < v_dim_) take(d + W, high);
    }
  }

  // out(i) gives where row i < count of the result goes; lse(i, natural logarithm). A row of no weight gives zeros. The
  // logit of a sink joins every row.
  template <class Out, class Lse>
  void finish(const AttentionRows& rows, int count, const Out& out, const Lse& lse, float sink = -kInfinity) const {
    for (int i = 0; i < count; i++) {
      const RowEnd end = end_row(rows.reference[i], reduce_add(load(rows.sums + i * W)), sink);
      const VF factor = set1(end.factor);
      auto* to = out(i);
      read_row(rows, i, [&](int d, VF value) {
        if (end.nothing) value = VF{};
        d + W <= v_dim_ ? store(to + d, value * factor) : store(to + d, value * factor, v_dim_ - d);
      });
      lse(i, end.lse);
    }
  }

 protected:
  RowsOnTiles(int dim, int v_dim, float scale_log2, int keys)
      : dim_(dim),
        v_dim_(v_dim),
        scale_(set1(scale_log2)),
        keys_(keys),
        q_{static_cast<int>(ceil_div(dim, kTileDepth))},
        v_{keys_ / kTileDepth} {}

  int dim_, v_dim_;
  VF scale_;
  int keys_;
  float key_unit_ = 1;   // what one of a scaled key is worth
  TileLayout<P> q_, v_;  // of queries and keys; of values and weights

  // What is packed of a block stays in the L1 cache, beside scores, weights and the rows that pass through.
  static int keys_in_cache(int dim, int v_dim) {
    const int64_t key_bytes = P * (round_up(dim, kTileDepth) + round_up(v_dim, kTileDepth)) * sizeof(Packed);
    const int64_t keys = 32 * 1024 / key_bytes / kTileDepth * kTileDepth;
    return static_cast<int>(min_of<int64_t>(kMaxBlockKeys, max_of<int64_t>(kTileDepth, keys)));
  }
  // A block divides `step` keys, or is divided by it, if possible.
  static int in_step(int keys, int step) {
    while (keys > kTileDepth && keys % step != 0 && step % keys != 0) keys -= kTileDepth;
    return keys;
  }
  int64_t key_size() const { return q_.at(keys_ / kTileRows, 0, 0); }
  int64_t value_size() const { return v_.at(columns() / kTileRows, 0, 0); }

  static int padded(int keys) { return static_cast<int>(round_up(keys, kTileDepth)); }

  // Scaled operands take the scale of the block before, and are packed again if it does not fit: a pass of its own for
  // the largest of them would wait for memory with nothing else to do.
  template <class KRow>
  void pack_keys(Packed* to, AttentionRows* tiles, const KRow& k, int keys) {
    if constexpr (Operands::kScaled) {
      float& scale = tiles->key_scale;
      const auto pack = [&] { return pack_right_halves_transposed(to, q_, k, keys, padded(keys), dim_, set1(scale)); };
      if (scale == 0) scale = key_scale(largest_of(k, keys, dim_));
      const float most = pack();
      if (most != 0 && !(most * scale >= kLeastKey && most * scale <= kMostKey)) {
        scale = key_scale(most);
        pack();
      }
      key_unit_ = 1 / scale;
    } else {
      pack_right_transposed<typename Operands::Element>(to, q_, Operands::rows(k), keys, padded(keys), dim_);
    }
  }
  template <class VRow, class Plan>
  void pack_values(Packed* to, AttentionRows* tiles, int count, const Plan& plan, const VRow& v, int keys) {
    if constexpr (Operands::kScaled) {
      const auto pack = [&] {
        return pack_right_halves(to, v_, v, keys, padded(keys), v_dim_, set1(scale_of(tiles->value_scale)));
      };
      if (tiles->value_scale == 0) set_value_scale(tiles, count, plan, largest_of(v, keys, v_dim_));
      if (set_value_scale(tiles, count, plan, pack())) pack();
    } else {
      pack_right<typename Operands::Element>(to, v_, Operands::rows(v), keys, padded(keys), v_dim_);
    }
  }
  template <class Row>
  static float largest_of(const Row& row, int count, int dim) {
    Largest largest;
    for (int i = 0; i < count; i++) largest.add(row(i), dim);
    return largest.most();
  }
  // Room for blocks of larger keys, and more of it for smaller ones.
  static constexpr float kLeastKey = 256, kMostKey = 61440;
  static float key_scale(float most) { return scale_to(13, most); }
  static float scale_of(float value_scale) { return value_scale == 0 ? 1 : value_scale; }
  // All blocks have one scale, as results add up; it leaves room for larger values, and where that does not suffice, a
  // smaller one is taken, for what was summed before too. Whether it has changed.
  template <class Plan>
  bool set_value_scale(AttentionRows* tiles, int count, const Plan& plan, float most) const {
    const float before = tiles->value_scale;
    if (!(most > 0 && most <= kFloatMost) || (before != 0 && most * before <= 32768.f)) return false;
    const float after = scale_to(10, most);
    for (int t = 0; t < count; t++) {
      tiles[t].value_scale = after;
      if (before == 0) continue;
      for (int i = 0; i < plan.rows(t) * columns(); i += W)
        store(tiles[t].out + i, load(tiles[t].out + i) * (after / before));
    }
    return true;
  }

  // ---- weights ----

  // How the products of a row become scores, and those weights.
  struct RowScale {
    VF scale, reference;
    int row;  // to policies
  };
  TILEWISE_INLINE RowScale scale_of_row(const AttentionRows& tile, int i) const {
    VF scale = scale_;
    if constexpr (Operands::kScaled) scale *= tile.units[i] * key_unit_;
    return {scale, set1(tile.reference[i]), tile.first + i};
  }
  template <class Visible>
  TILEWISE_INLINE static VF score(const RowScale& row, const float* products, int key, const Visible& visible) {
    return seen_score(visible, load(products) * row.scale, row.reference, row.row, key);
  }
  // The weights of 32 keys from `key` on, also in parts.
  template <class Exp2, class Visible>
  TILEWISE_INLINE void weigh_keys(const RowScale& row, const float* products, int key, const Exp2& exp2,
                                  const Visible& visible, VF& low, VF& high, Packed* to) const {
    low = exp2(score(row, products, key, visible));
    high = exp2(score(row, products + W, key + W, visible));
    Halves parts[P];
    Operands::split_weights(met_weight(visible, low, row.row, key), met_weight(visible, high, row.row, key + W), parts);
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) _mm512_store_si512(to + v_.at(0, p, 0), parts[p]);
  }

  // The score of the first key is a good reference for most rows, if the row sees it. `end`: of the keys at hand.
  template <class Visible>
  TILEWISE_INLINE void set_reference(const AttentionRows& tile, int i, const float* products, int end,
                                     const Visible& visible) const {
    const RowScale row = unreferenced(tile, i);
    const float first = Operands::kPeakFirst ? peak(row, products, end, visible) : score(row, products, 0, visible)[0];
    tile.reference[i] = max_of(first - Operands::kHeadroom, kLowestReference);
  }
  TILEWISE_INLINE RowScale unreferenced(const AttentionRows& tile, int i) const {
    RowScale row = scale_of_row(tile, i);
    row.reference = VF{};
    return row;
  }
  // The largest score of a row.
  template <class Visible>
  TILEWISE_INLINE static float peak(const RowScale& row, const float* products, int end, const Visible& visible) {
    VF most = set1(kLowestReference);
    for (int key = 0; key < end; key += W) most = max(most, score(row, products + key, key, visible));
    return reduce_max(most);
  }

  // Raises the reference of row i to its largest score of the block, and rescales what was summed before.
  template <class Visible>
  void raise_reference(const AttentionRows& tile, int i, const float* products, int end, const Visible& visible) const {
    const float highest = peak(unreferenced(tile, i), products, end, visible);
    const float after = max_of(highest - Operands::kHeadroom, tile.reference[i]);
    const VF factor = exp2(set1(tile.reference[i]) - set1(after));
    tile.reference[i] = after;
    store(tile.sums + i * W, load(tile.sums + i * W) * factor);
    float* out = tile.out + i * columns();
    for (int d = 0; d < columns(); d += W) store(out + d, load(out + d) * factor);
  }
};

}  // namespace
}  // namespace tilewise
