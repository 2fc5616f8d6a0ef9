// Few queries on AMX tiles: a team of key heads, a few rows each, passes over a range of keys together, so that
// pages are read as they lie in memory.
//
// Scores are S^T = K Q^T: 16 keys are a left operand as they stand in a page of bf16, or as their codes decode, so
// nothing is transposed but the scores. Outputs are O = P V, and 16 values are a right operand as they stand, too: its
// pairs are neighbouring channels of one key instead of a channel of two keys, so weights are paired with zero, as (w,
// 0) for the even channels and once more as (0, w) for the odd ones. Where queries or weights take several parts
// (tiles.h), these are further columns and rows, and their products are added at the end. Tiles are as narrow as there
// are such rows.
#pragma once
#include "common/paged/cpu/ahead.h"
#include "common/paged/cpu/attention.h"
#include "common/paged/cpu/words.h"
#include "common/tile_attention.h"

namespace tilewise::paged {
namespace {

constexpr int kTeamKeys = 2 * kTileRows;
constexpr Share kTeamShare = {8, kTeamKeys, 512};
alignas(64) constexpr char kZeroRow[2 * kMaxHeadDim + 64] = {};

// In how many parts queries and weights meet codes or bf16, which are one. 16 bits of a weight are enough for results
// in bf16, 8 are not.
inline int query_parts(const AttentionParams& p) {
  return p.type == Type::bf16 && !p.k_channels ? 1 : 3;
}
inline int weight_parts(const AttentionParams& p) {
  return p.type == Type::bf16 ? 2 : 3;
}
inline bool fits_team(const AttentionParams& p) {
  return p.tokens * (p.q_heads / p.kv_heads) * max_of(query_parts(p), weight_parts(p)) <= kTileRows;
}

// The running result of one head's rows.
struct TeamHead {
  Packed* q;         // [step][pair of words][part][row][2]
  float* out;        // [even, odd][part][row][half], of channels
  float* sums;       // [row][W] of weights, to be added up at the end
  float* zeros;      // [row][W] likewise, of weights times the values' zeros
  float* reference;  // [row]
  float* q_sums;     // [row], for the keys' zeros
};

// Scales and zeros of a block's rows.
struct TeamPairs {
  alignas(64) int32_t k[kTeamKeys] = {}, v[kTeamKeys] = {};
};

template <class Source, class Visibility>
struct TeamTask {
  using Words = WordRows<Source>;
  static constexpr int kRing = 3;

  const Task<Visibility>& task;
  Words words;
  Softcap softcap;
  int rows, steps, columns, half, q_columns, w_rows;  // the last two: rows in all their parts
  bool joined;                                        // weights of even and odd channels fit one tile
  float factor;
  Packed *k_room, *v_room, *weights;
  TeamHead heads[kTeamShare.heads];
  KeyRows blocks[kRing];
  TeamPairs pairs[2];
  alignas(64) float scores[2][kTeamKeys * kTileRows];
  int32_t places[kMaxHeadDim];  // of the channels in `out`

  TeamTask(const Task<Visibility>& task)
      : task(task),
        words(task.p.dim),
        softcap(task.p),
        rows(task.rows),
        steps(words.units() * Words::kVectors),
        columns(steps * kWords),
        half(columns / 2),
        q_columns(rows * query_parts(task.p)),
        w_rows(rows * weight_parts(task.p)),
        joined(2 * w_rows <= kTileRows),
        factor(task.p.scale * kLog2e) {
    for (int s = 0; s < steps; s++)
      for (int i = 0; i < kWords; i++)
        if (const int d = Words::channel(s, i); d < task.p.dim) places[d] = i % 2 * w_rows * half + s * W + i / 2;
  }

  // ---- memory and queries ----

  bool start(const Runtime& rt) {
    const int64_t tiles = int64_t(4 * steps + 4) * kTileSize, q = int64_t(steps) * kTileDepth * q_columns;
    const int64_t state = w_rows * columns + int64_t(rows) * (2 * W + 2);
    const int64_t bytes = tiles * sizeof(Packed) + task.heads * (q * sizeof(Packed) + state * sizeof(float));
    k_room = scratch<Packed>(rt, 2, ceil_div(bytes, sizeof(Packed)));
    if (!k_room) return false;
    v_room = k_room + 2 * steps * kTileSize;
    weights = v_room + 2 * steps * kTileSize;
    Packed* packed = weights + 4 * kTileSize;
    float* at = reinterpret_cast<float*>(packed + task.heads * q);
    for (int64_t i = 0; i < task.heads * state; i++) at[i] = 0;
    for (int h = 0; h < task.heads; h++, packed += q, at += state) {
      float *sums = at + w_rows * columns, *reference = sums + 2 * rows * W;
      heads[h] = {packed, at, sums, sums + rows * W, reference, reference + rows};
      for (int m = 0; m < rows; m++) pack_query(heads[h], task.of_head(h), m);
    }
    return true;
  }

  void pack_query(const TeamHead& head, const Task<Visibility>& own, int m) {
    float row[kMaxHeadDim + W];
    own.load_query(m, row, columns, 1.f);
    VF sum = {};
    for (int d = 0; d < columns; d += W) sum += load(row + d);
    head.q_sums[m] = reduce_add(sum) * factor;
    head.reference[m] = kLowest;
    auto* to = reinterpret_cast<int32_t*>(head.q) + m;
    for (int s = 0; s < steps; s++, to += kTileRows * q_columns) {
      VF even, odd;
      for (int i = 0; i < W; i++) {
        even[i] = row[Words::channel(s, 2 * i)];
        odd[i] = row[Words::channel(s, 2 * i + 1)];
      }
      Halves parts[3];
      split_any(even, odd, parts);
      for (int part = 0; part * rows < q_columns; part++)
        for (int i = 0; i < W; i++) to[i * q_columns + part * rows] = ((VI)parts[part])[i];
    }
  }

  // ---- keys and values ----

  struct TileRows {
    const char* first;
    int64_t row_bytes, step_bytes;
  };

  // Sixteen keys, or values, from row i of the block on.
  TILEWISE_INLINE TileRows tile_rows(const KeyRows& block, const char* const* at, int64_t slot, int64_t head_bytes,
                                     int i, Packed* room, int32_t* pair) {
    const AttentionParams& p = task.p;
    if constexpr (Words::kDecoded)
      if (p.dim % kWords == 0 && block.in_one_page(i, kTileRows, p.table.page_size))
        return {at[i] + head_bytes, slot * Source::kItem, kWords * sizeof(Packed)};
    Packed* to = room + i * steps * kWords;
    const Words local = words;  // stores to memory cannot change it
    const char* rows[kTileRows];
    for (int j = 0; j < kTileRows; j++) {
      rows[j] = i + j < block.count ? at[i + j] + head_bytes : kZeroRow;
      if constexpr (Source::kScaled) pair[i + j] = local.pair(rows[j]);
    }
    for (int u = 0; u < local.units(); u++)
      for (int j = 0; j < kTileRows; j++) {
        Halves x[Words::kHalves];
        local.load_unit(rows[j], u, x);
#pragma GCC unroll 4
        for (int v = 0; v < Words::kVectors; v++)
          _mm512_store_si512(to + (u * Words::kVectors + v) * kTileSize + j * kWords, local.decode(x, v));
      }
    return {reinterpret_cast<const char*>(to), kWords * sizeof(Packed), kTileSize * sizeof(Packed)};
  }

  // What is multiplied at a time: a head's queries with 32 keys, and another's weights with 32 values.
  struct KeyTiles {
    const Packed* q;
    TileRows low, high;
    float* scores;  // [key][part][row]
  };
  struct ValueTiles {
    TileRows low, high;
    float* out;
  };
  KeyTiles find_keys(const KeyRows& block, int h, int turn) {
    const PageStrides& s = task.p.k_strides;
    const auto tile = [&](int i) {
      return tile_rows(block, block.k, s.slot, h * s.head * Source::kItem, i, k_room, pairs[turn].k);
    };
    return {heads[h].q, tile(0), tile(kTileRows), scores[turn]};
  }
  ValueTiles find_values(const KeyRows& block, int h, int turn) {
    const PageStrides& s = task.p.v_strides;
    const auto tile = [&](int i) {
      return tile_rows(block, block.v, s.slot, h * s.head * Source::kItem, i, v_room, pairs[turn].v);
    };
    return {tile(0), tile(kTileRows), heads[h].out};
  }

  // Both products in turn: each waits for sums of its own.
  template <bool Scores, bool Values>
  TILEWISE_INLINE void multiply(const KeyTiles& keys, const ValueTiles& values, Ahead& ahead, int lines) {
    const int64_t q_bytes = q_columns * sizeof(int32_t);
    if constexpr (Scores) {
      zero_tile<0>();
      zero_tile<1>();
    }
    if constexpr (Values)
      if (joined) {
        load_tile<6>(weights, 64);
        load_tile<7>(weights + 2 * w_rows * kWords, 64);
      }
    for (int s = 0; s < steps; s++) {
      if constexpr (Scores) {
        load_tile<2>(keys.q + s * kTileDepth * q_columns, q_bytes);
        load_tile<3>(keys.low.first + s * keys.low.step_bytes, keys.low.row_bytes);
        multiply_tiles<0, 3, 2>();
      }
      if constexpr (Values) joined ? add_values(values, s) : add_values_apart(values, s);
      if constexpr (Scores) {
        load_tile<3>(keys.high.first + s * keys.high.step_bytes, keys.high.row_bytes);
        multiply_tiles<1, 3, 2>();
      }
      if constexpr (Values) ahead.go_on(lines);
    }
    if constexpr (Scores) {
      store_tile<0>(keys.scores, q_bytes);
      store_tile<1>(keys.scores + kTileRows * q_columns, q_bytes);
    }
  }
  TILEWISE_INLINE void add_values(const ValueTiles& values, int s) {
    float* out = values.out + s * W;
    load_tile<5>(out, half * sizeof(float));
    load_tile<4>(values.low.first + s * values.low.step_bytes, values.low.row_bytes);
    multiply_tiles<5, 6, 4>();
    load_tile<4>(values.high.first + s * values.high.step_bytes, values.high.row_bytes);
    multiply_tiles<5, 7, 4>();
    store_tile<5>(out, half * sizeof(float));
  }
  TILEWISE_INLINE void add_values_apart(const ValueTiles& values, int s) {
    const int64_t out_bytes = half * sizeof(float), tile = w_rows * kWords;
    float *even = values.out + s * W, *odd = even + w_rows * half;
    load_tile<5>(even, out_bytes);
    load_tile<7>(odd, out_bytes);
    for (int i = 0; i < 2; i++) {
      const TileRows& rows = i ? values.high : values.low;
      load_tile<4>(rows.first + s * rows.step_bytes, rows.row_bytes);
      load_tile<6>(weights + 2 * i * tile, 64);
      multiply_tiles<5, 6, 4>();
      load_tile<6>(weights + (2 * i + 1) * tile, 64);
      multiply_tiles<7, 6, 4>();
    }
    store_tile<5>(even, out_bytes);
    store_tile<7>(odd, out_bytes);
  }

  // ---- weights ----

  // What the keys' and values' scales and zeros make of scores and weights; nothing where rows have none.
  struct Scaling {
    VF k_scale[2], k_zero[2], v_scale[2], v_zero[2];

    TILEWISE_INLINE Scaling(const TeamPairs& pairs, float factor) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) {
        const VI k = load(pairs.k + i * W), v = load(pairs.v + i * W);
        k_scale[i] = ScaleZero::scale(k) * factor;
        k_zero[i] = ScaleZero::zero(k);
        v_scale[i] = ScaleZero::scale(v);
        v_zero[i] = ScaleZero::zero(v);
      }
    }
  };

  // Products to scores, to weights, to parts of them.
  TILEWISE_INLINE void weigh_row(const TeamHead& head, const Scaling& scaling, int m, VF (&x)[2], uint32_t seen) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      if constexpr (Source::kScaled)
        x[i] = x[i] * scaling.k_scale[i] + scaling.k_zero[i] * set1(head.q_sums[m]);
      else
        x[i] *= factor;
      if (softcap) x[i] = softcap(x[i]);
      x[i] = (VF)_mm512_mask_mov_ps(_mm512_set1_ps(-kInfinity), __mmask16(seen >> i * W), (__m512)x[i]);
    }
    const VF largest = max(x[0], x[1]);
    if (any(largest > set1(head.reference[m] + kReferenceSlack))) raise_reference(head, m, reduce_max(largest));
    VF sum = load(head.sums + m * W), zero = load(head.zeros + m * W);
    const VF reference = set1(head.reference[m]);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      x[i] = fast_exp2(x[i] - reference);
      sum += x[i];
      if constexpr (Source::kScaled) {
        zero += x[i] * scaling.v_zero[i];
        x[i] *= scaling.v_scale[i];
      }
    }
    store(head.sums + m * W, sum);
    if constexpr (Source::kScaled) store(head.zeros + m * W, zero);
    w_rows == 2 * rows ? store_weights<2>(m, x[0], x[1]) : store_weights<3>(m, x[0], x[1]);
  }
  template <int P>
  TILEWISE_INLINE void store_weights(int m, VF low, VF high) {
    VF x[2] = {low, high};
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
#pragma GCC unroll 3
      for (int part = 0; part < P; part++) {
        Packed* even = weights + (i * 2 * w_rows + part * rows + m) * kWords;
        _mm512_store_si512(even, _mm512_srli_epi32((__m512i)x[i], 16));
        _mm512_store_si512(even + w_rows * kWords, (__m512i)high_part(x[i]));
        x[i] -= high_part(x[i]);
      }
  }
  void raise_reference(const TeamHead& head, int m, float top) {
    const VF shrink = exp2(set1(head.reference[m] - top));
    head.reference[m] = top;
    store(head.sums + m * W, load(head.sums + m * W) * shrink);
    store(head.zeros + m * W, load(head.zeros + m * W) * shrink);
    for (int row = m; row < 2 * w_rows; row += rows)
      for (float *at = head.out + row * half, *end = at + half; at < end; at += W) store(at, load(at) * shrink);
  }

  uint32_t seen_by(int m, const KeyRows& block) const {
    const uint32_t all = ~uint32_t(0) >> (kTeamKeys - block.count);
    return task.keys.full(block.first) ? all : all & uint32_t(task.visible.seen(task.token(m), block.first).words[0]);
  }
  void weigh(const KeyRows& block, const TeamHead& head, int turn) {
    const Scaling scaling(pairs[turn], factor);
    const float* from = scores[turn];
    if (q_columns == 1) {
      VF x[2] = {load(from), load(from + W)};
      return weigh_row(head, scaling, 0, x, seen_by(0, block));
    }
    VF turned[kTileRows][2];
    for (int c = 0; c < q_columns; c += 4) {
      VF low[4], high[4];
      load_columns([&](int i) { return from + i * q_columns + c; }, 0, low);
      load_columns([&](int i) { return from + (kTileRows + i) * q_columns + c; }, 0, high);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) turned[c + i][0] = low[i], turned[c + i][1] = high[i];
    }
    for (int m = 0; m < rows; m++) {
      VF x[2] = {turned[m][0], turned[m][1]};
      for (int c = m + rows; c < q_columns; c += rows) x[0] += turned[c][0], x[1] += turned[c][1];
      weigh_row(head, scaling, m, x, seen_by(m, block));
    }
  }

  // ---- all of it ----

  // Tiles 0 to 2: keys x rows, and queries; 3 and 4: keys, values; 5 to 7: rows x values, and weights, or as many of
  // each for even and for odd channels.
  TileConfig tile_sizes() const {
    TileConfig sizes;
    for (int i = 0; i < 3; i++) sizes.row_bytes[i] = uint16_t(q_columns * sizeof(int32_t));
    for (int i = 5; i < 8; i++) sizes.rows[i] = uint8_t(joined ? 2 * w_rows : w_rows);
    return sizes;
  }

  void find(KeyRows& block, int64_t from) const {
    block.find(task, from, task.keys.block_end(from, kTeamKeys), Source(task.p.dim));
  }

  // While one head's weights meet its values, the next one's scores are computed.
  void run() {
    const TileScope scope(tile_sizes());
    find(blocks[0], task.keys.first);
    find(blocks[1], blocks[0].first + blocks[0].count);
    if (!blocks[0].count) return;
    const int64_t k_bytes = task.p.k_strides.head * Source::kItem, v_bytes = task.p.v_strides.head * Source::kItem;
    Ahead nothing(blocks[2], k_bytes, v_bytes, 0);
    multiply<true, false>(find_keys(blocks[0], 0, 0), {}, nothing, 0);
    int turn = 0;
    for (int at = 0; blocks[at].count; at = (at + 1) % kRing) {
      const KeyRows &block = blocks[at], &next = blocks[(at + 1) % kRing];
      KeyRows& over_next = blocks[(at + 2) % kRing];
      find(over_next, next.first + next.count);
      Ahead ahead(task.heads < 4 ? over_next : next, k_bytes, v_bytes, task.heads);
      const int lines = Words::kDecoded ? 0 : ahead.share(int64_t(task.heads) * steps);
      for (int h = 0; h < task.heads; h++, turn ^= 1) {
        const bool last = h + 1 == task.heads;
        const ValueTiles values = find_values(block, h, turn);
        weigh(block, heads[h], turn);
        if (!last || next.count)
          multiply<true, true>(find_keys(last ? next : block, last ? 0 : h + 1, turn ^ 1), values, ahead, lines);
        else
          multiply<false, true>({}, values, ahead, lines);
      }
    }
  }

  bool finite(const TeamHead& head) const {
    VF zero = {};  // NaN from the first infinity or NaN on
    for (int i = 0; i < w_rows * columns + 2 * rows * W; i += W) zero += load(head.out + i) * 0.f;
    return !any(zero != zero);
  }
  void write(const TeamHead& head, const Task<Visibility>& own) const {
    const int dim = task.p.dim;
    float row[kMaxHeadDim + W];
    for (int m = 0; m < rows; m++) {
      const float zero = reduce_add(load(head.zeros + m * W));
      for (int d = 0; d < dim; d++) {
        row[d] = head.out[places[d] + m * half];
        for (int part = m + rows; part < w_rows; part += rows) row[d] += head.out[places[d] + part * half];
        row[d] += zero;
      }
      own.write(m, row, head.reference[m], reduce_add(load(head.sums + m * W)));
    }
  }
};

template <class Source, class Visibility>
bool attend_team(const Task<Visibility>& task, const Runtime& rt) {
  TeamTask<Source, Visibility> work(task);
  if (!work.start(rt)) return false;
  work.run();
  uint32_t left = 0;  // heads that another kernel has to decide: parts of infinite inputs may have become NaN
  for (int h = 0; h < task.heads; h++) {
    if (work.finite(work.heads[h]))
      work.write(work.heads[h], task.of_head(h));
    else
      left |= 1u << h;
  }
  for (int h = 0; h < task.heads; h++)
    if (left >> h & 1 && !attend_rows<Source>(task.of_head(h), rt)) return false;
  return true;
}

template <class Source, class Visibility>
const char* attend_teams(const typename Visibility::Params& p, const Runtime& rt) {
  return run_tasks<Visibility>(
      p, rt, kTeamShare, [](const Task<Visibility>& task, const Runtime& rt) { return attend_team<Source>(task, rt); });
}

}  // namespace
}  // namespace tilewise::paged
