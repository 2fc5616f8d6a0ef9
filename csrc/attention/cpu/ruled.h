// Tiles of queries under rules beside causality. The rules are asked row by row, W keys at a time, and their answers
// turned on the diagonal to meet lanes of queries. They wait where the products will stand; or products are stored as
// they are and adjusted in a pass of their own. A mask alone is not turned: its bits stand by key in words of the rows.
#pragma once
#include "attention/cpu/rules.h"
#include "attention/cpu/tile.h"

namespace tilewise {
namespace {

constexpr int kRuledKeys = 112;  // keys of a block, at most: a multiple of 16
static_assert(kRuledKeys <= kKeys, "ruled blocks share the workspaces of plain ones");

// Whole blocks of the block mask, where there is one.
inline int ruled_keys(const Rules& r) {
  if (!r.blocks) return kRuledKeys;
  return r.block_k > kRuledKeys ? r.block_k / 2 : kRuledKeys / r.block_k * r.block_k;
}

// Where a tile of queries and a block of keys lie in their sequence.
struct Place {
  int64_t row, key;
  int rows, keys;
  int vectors() const { return static_cast<int>(ceil_div(rows, W)); }
};

// What a tile sees of a block of keys: regions whose vectors all see something, `masked` where not all of it. Vectors
// are taken apart only where they lie in different rows of the block mask.
struct RuledRegions {
  static constexpr int kMost = kVectors * (kRuledKeys / 16 + 4);
  Region list[kMost];
  int size = 0;
  bool plain;  // nothing is masked, and scores and weights stay as they are

  RuledRegions(const HeadRules& rules, const Rules& r, const Place& at)
      : plain(!rules.changes_scores() && !rules.drops()) {
    for (int v = 0; v < at.vectors();) {
      int end = v + 1;
      while (end < at.vectors() && (!r.blocks || (at.row + end * W) % r.block_q != 0)) end++;
      add_rows(rules, at, v, end - v);
      v = end;
    }
  }

  const Region* begin() const { return list; }
  const Region* end() const { return list + size; }

 private:
  void add_rows(const HeadRules& rules, const Place& at, int vector, int vectors) {
    const int64_t first = at.row + vector * W, last = min_of(first + vectors * W, at.row + at.rows) - 1;
    const int start = size;
    const int64_t end = at.key + at.keys;
    for (int64_t key = at.key; key < end;) {
      const Span span = rules.look(first, last, key);
      const int from = static_cast<int>(key - at.key), to = static_cast<int>(min_of(span.end, end) - at.key);
      const bool masked = span.sight == Sight::some || rules.adds();
      key = at.key + to;
      if (span.sight == Sight::none) continue;
      plain = plain && !masked;
      if (size > start && list[size - 1].end == from && list[size - 1].masked == masked)
        list[size - 1].end = to;
      else
        list[size++] = {from, to, vector, vectors, masked, 0, 1};
    }
  }
};

// to[key][lane] = rows[key] . tile[.][lane] over a region, for N vectors of lanes.
template <int N>
void product_region(const Region& region, int depth, const Rows& rows, const float* tile, float* to) {
  const int lane = region.vector * W;
  for_rows(region.end - region.begin, [&](auto block, int i) {
    constexpr int M = decltype(block)::value;
    const int key = region.begin + i;
    VF acc[M][N] = {};
    multiply_in_chains(acc, depth, rows.data + key * rows.stride, rows.stride, tile + lane);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int v = 0; v < N; v++) store(to + (key + m) * kLanes + lane + v * W, acc[m][v]);
  });
}

using ProductRegion = void (*)(const Region&, int, const Rows&, const float*, float*);
constexpr ProductRegion kProductRegion[] = {product_region<1>, product_region<2>, product_region<3>,
#if defined(__AVX512F__)
                                            product_region<4>
#endif
};

// body(lane, first key, end) for the region's vectors of lanes and its keys, at most W at a time and never across a
// multiple of W.
template <class F>
TILEWISE_INLINE void for_squares(const Region& r, const F& body) {
  for (int v = r.vector; v < r.vector + r.vectors; v++)
    for (int key = r.begin; key < r.end;) {
      const int end = min_of(key / W * W + W, r.end);
      body(v * W, key, end);
      key = end;
    }
}

// What the rules add, by key of a square: extra[key % W] of lanes [lane, lane + W).
TILEWISE_INLINE void turn_extra(const HeadRules& rules, const Place& at, int lane, int key, VF (&extra)[W]) {
  rules.extras(at.row + lane, at.key + key / W * W, [&](int j, VF column) { extra[j] = column; });
}

// Extras of keys [r.begin, r.end) go where products of the same places will stand, and of up to W - 1 keys beside them.
inline void write_extras(const HeadRules& rules, const Region& r, const Place& at, float* to) {
  for_squares(r, [&](int lane, int first, int) {
    float* const base = to + first / W * W * kLanes + lane;
    rules.extras(at.row + lane, at.key + first / W * W, [&](int j, VF column) { store(base + j * kLanes, column); });
  });
}

// A mask's bits of a tile and a block, in words that hold lanes side by side.
constexpr int kMaskWords = kRuledKeys / 32 + 2;
struct MaskBits {
  int32_t* words;  // [word][lane]: bit i of word n lets the lane see key 32 n + i - offset of the block
  int offset;

  void take(const HeadRules& rules, const Place& at) {
    offset = static_cast<int>(at.key % 32);
    const int64_t first = at.key / 32;
    const int count = static_cast<int>((at.key + at.keys - 1) / 32 - first) + 1;
    for (int i = 0; i < at.vectors() * W; i++) {
      const uint32_t* from = rules.mask_row(at.row + i) + first;
      for (int n = 0; n < count; n++) words[n * kLanes + i] = static_cast<int32_t>(from[n]);
    }
  }
  TILEWISE_INLINE VF hide(VF score, int lane, int key) const {
    const uint32_t bit = offset + key;
    const VI word = load(words + bit / 32 * kLanes + lane);
#if defined(__AVX512F__)
    const __mmask16 seen = _mm512_test_epi32_mask((__m512i)word, _mm512_set1_epi32(int32_t(1u << bit % 32)));
    return (VF)_mm512_mask_mov_ps(_mm512_set1_ps(-kInfinity), seen, (__m512)score);
#elif defined(__AVX2__)
    const __m256i sign = _mm256_sllv_epi32((__m256i)word, _mm256_set1_epi32(int32_t(31 - bit % 32)));
    return (VF)_mm256_blendv_ps(_mm256_set1_ps(-kInfinity), (__m256)score, (__m256)sign);
#else
    return select((word << int32_t(31 - bit % 32)) < VI{}, score, set1(-kInfinity));
#endif
  }
};

// Lines of the bias that the next tile or block will need, row by row.
struct ToCome {
  const char* next = nullptr;
  int64_t skip = 0;  // from the end of one row's lines to the next row's, in bytes
  int left = 0, line = 0, lines = 1, share = 0;

  ToCome() = default;
  ToCome(const HeadRules& rules, const Place& at) {
    int64_t stride;
    next = rules.bias_to_come(at.row, at.key, stride);
    lines = static_cast<int>(ceil_div(at.keys * rules.bias_bytes(), 64));
    skip = stride - lines * 64;
    left = lines * kLanes;
    share = static_cast<int>(ceil_div(left, at.keys));
  }
  TILEWISE_INLINE void ask() {
    if (left == 0) return;
    __builtin_prefetch(next, 0, 2);
    next += 64;
    left--;
    if (++line < lines) return;
    line = 0;
    next += skip;
  }
};

// What dropout multiplies weights by, for lanes from `lane` on; asks for random words once for eight keys.
class KeptLanes {
 public:
  KeptLanes(const HeadRules& rules, const Place& at, int lane) : rules_(rules), at_(at), lane_(lane) {}
  TILEWISE_INLINE VF operator()(int key) {
    if (key / 8 != group_) {
      group_ = key / 8;
      rules_.random(at_.row + lane_, at_.key + group_ * 8, words_);
    }
    return select(rules_.keeps(words_, key % 8), set1(rules_.keep_scale()), VF{});
  }

 private:
  const HeadRules& rules_;
  const Place& at_;
  int lane_, group_ = -1;
  VU words_[4];
};

// Products become scores, in place; the highest of each lane goes into peak.
inline void adjust_scores(const HeadRules& rules, const Region& r, const Place& at, float* scores, float* peak) {
  for_squares(r, [&](int lane, int first, int end) {
    VF extra[W];
    if (r.masked) turn_extra(rules, at, lane, first, extra);
    VF highest = load(peak + lane);
    for (int key = first; key < end; key++) {
      float* to = scores + key * kLanes + lane;
      VF score = load(to);
      if (rules.caps()) score = rules.cap(score);
      if (r.masked) score = HeadRules::added(score, extra[key % W]);
      highest = max(highest, score);
      store(to, score);
    }
    store(peak + lane, highest);
  });
}

// Scores become probabilities relative to reference, in place; their sum is of all, dropped ones too.
inline void exponentiate(const HeadRules& rules, const Region& r, const Place& at, const float* reference,
                         float* scores, float* sums) {
  for (int v = r.vector; v < r.vector + r.vectors; v++) {
    const int lane = v * W;
    const VF base = load(reference + lane);
    VF sum = load(sums + lane);
    KeptLanes kept(rules, at, lane);
    for (int key = r.begin; key < r.end; key++) {
      float* to = scores + key * kLanes + lane;
      VF weight = exp2(load(to) - base);
      sum += weight;
      if (rules.drops()) weight *= kept(key);
      store(to, weight);
    }
    store(sums + lane, sum);
  }
}

// Of one tile, in base 2.
struct RowStatistics {
  const float *lse, *lse_rest;  // [lane]: what the weights are relative to, and what its rounding lost
  const float* delta;           // [lane]
};

// Products of queries and keys become weights, those of dout and values become dS, in place. dS is the gradient of the
// scores, or of the products where `through_cap`.
inline void adjust_gradients(const HeadRules& rules, const Region& r, const Place& at, const RowStatistics& row,
                             bool through_cap, float* p, float* ds) {
  for_squares(r, [&](int lane, int first, int end) {
    VF extra[W];
    if (r.masked) turn_extra(rules, at, lane, first, extra);
    const VF lse = load(row.lse + lane), lse_rest = load(row.lse_rest + lane), delta = load(row.delta + lane);
    KeptLanes kept(rules, at, lane);
    for (int key = first; key < end; key++) {
      const int place = key * kLanes + lane;
      VF score = load(p + place), dp = load(ds + place), slope = set1(1);
      if (rules.caps()) score = rules.cap(score, slope);
      if (r.masked) score = HeadRules::added(score, extra[key % W]);
      // Above lse only by rounding, which is large where all scores of a row are.
      const VF weight = exp2(min(set1(1), score - lse - lse_rest));
      const VF keep = rules.drops() ? kept(key) : set1(1);
      VF gradient = weight * (dp * keep - delta);
      if (through_cap && rules.caps()) gradient *= slope;
      store(p + place, weight * keep);
      store(ds + place, gradient);
    }
  });
}

}  // namespace
}  // namespace tilewise
