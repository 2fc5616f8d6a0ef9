// A team on tiles of bf16.
//
// Scores are S^T = K Q^T: 16 keys are a left operand as they stand in a page of bf16, or as their codes decode, so
// nothing is transposed but the scores. Outputs are O = P V, and 16 values are a right operand as they stand, too: its
// pairs are neighbouring channels of one key instead of a channel of two keys, so weights are paired with zero, as (w,
// 0) for the even channels and once more as (0, w) for the odd ones. Where queries or weights take several parts
// (tiles.h), these are further columns and rows, and their products are added at the end. Tiles are as narrow as there
// are such rows.
#pragma once
#include "common/paged/cpu/team.h"
#include "common/paged/cpu/words.h"

namespace tilewise::paged {
namespace {

// In how many parts queries and weights meet codes or bf16, which are one. 16 bits of a weight are enough for results
// in bf16; more rows of a cache in bf16 take 8, as they do in tile_attention.h.
inline int query_parts(const AttentionParams& p) {
  return p.type == Type::bf16 && !p.k_channels ? 1 : 3;
}
inline int weight_parts(const AttentionParams& p) {
  if (p.type != Type::bf16) return 3;
  return p.format == Format::native && 2 * team_rows(p) > kTileRows ? 1 : 2;
}
inline bool fits_team(const AttentionParams& p) {
  return team_rows(p) * max_of(query_parts(p), weight_parts(p)) <= kTileRows;
}

// Scales and zeros of a block's rows.
struct TeamPairs {
  alignas(64) int32_t k[kTeamKeys] = {}, v[kTeamKeys] = {};
};

// What is multiplied at a time: a head's queries with 32 keys, and another's weights with 32 values.
struct KeyTiles {
  const int32_t* q;
  TileRows low, high;
  float* scores;  // [key][part][row]
};
struct ValueTiles {
  TileRows low, high;
};

template <class Source, class Visibility>
struct WordTeam : Team<Source, Visibility> {
  using Rows = Source;
  using Words = WordRows<Source>;
  using Base = Team<Source, Visibility>;
  using Base::blocks, Base::heads, Base::places, Base::rows, Base::task;

  Words words;
  int parts, steps, columns, half, q_columns, w_rows;  // the last two: rows in all their parts
  bool joined;                                         // weights of even and odd channels fit one tile
  Packed *k_room, *v_room, *weights;
  TeamPairs pairs[2];
  alignas(64) float scores[2][kTeamKeys * kTileRows];

  WordTeam(const Task<Visibility>& task) : WordTeam(task, Words(task.p.dim)) {}
  WordTeam(const Task<Visibility>& task, Words words)
      : Base(task, task.rows, 2 * task.rows * weight_parts(task.p), words.units() * Words::kVectors * W),
        words(words),
        parts(weight_parts(task.p)),
        steps(words.units() * Words::kVectors),
        columns(steps * kWords),
        half(columns / 2),
        q_columns(rows * query_parts(task.p)),
        w_rows(rows * parts),
        joined(2 * w_rows <= kTileRows) {
    for (int s = 0; s < steps; s++)
      for (int i = 0; i < kWords; i++)
        if (const int d = Words::channel(s, i); d < task.p.dim) places[d] = i % 2 * w_rows * half + s * W + i / 2;
  }

  // ---- memory and queries ----

  bool start(const Runtime& rt) {
    const int64_t tiles = int64_t(4 * steps + 4) * kTileSize, q = int64_t(steps) * kTileRows * q_columns;
    const int64_t bytes = tiles * sizeof(Packed) + task.heads * (q * sizeof(int32_t) + this->state() * sizeof(float));
    k_room = scratch<Packed>(rt, 2, ceil_div(bytes, sizeof(Packed)));
    if (!k_room) return false;
    v_room = k_room + 2 * steps * kTileSize;
    weights = v_room + 2 * steps * kTileSize;
    int32_t* packed = reinterpret_cast<int32_t*>(weights + 4 * kTileSize);
    this->share_out(packed, q, reinterpret_cast<float*>(packed + task.heads * q));
    for (int h = 0; h < task.heads; h++)
      for (int m = 0; m < rows; m++) pack_query(heads[h], task.of_head(h), m);
    return true;
  }

  void pack_query(TeamHead& head, const Task<Visibility>& own, int m) {
    float row[kMaxHeadDim + W];
    this->load_query(head, own, m, row, columns);
    int32_t* to = head.q + m;
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
    return {tile(0), tile(kTileRows)};
  }

  // Both products in turn: each waits for sums of its own.
  template <bool Scores, bool Values>
  TILEWISE_INLINE void multiply(const KeyTiles& keys, const ValueTiles& values, float* out, Ahead& ahead, int lines) {
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
        load_tile<2>(keys.q + s * kTileRows * q_columns, q_bytes);
        load_tile<3>(keys.low.first + s * keys.low.step_bytes, keys.low.row_bytes);
        multiply_tiles<0, 3, 2>();
      }
      if constexpr (Values) joined ? add_values(values, out + s * W, s) : add_values_apart(values, out + s * W, s);
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
  TILEWISE_INLINE void add_values(const ValueTiles& values, float* out, int s) {
    load_tile<5>(out, half * sizeof(float));
    load_tile<4>(values.low.first + s * values.low.step_bytes, values.low.row_bytes);
    multiply_tiles<5, 6, 4>();
    load_tile<4>(values.high.first + s * values.high.step_bytes, values.high.row_bytes);
    multiply_tiles<5, 7, 4>();
    store_tile<5>(out, half * sizeof(float));
  }
  TILEWISE_INLINE void add_values_apart(const ValueTiles& values, float* even, int s) {
    const int64_t out_bytes = half * sizeof(float), tile = w_rows * kWords;
    float* odd = even + w_rows * half;
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

  // A single part is rounded; of several each is what the others left.
  template <int P>
  TILEWISE_INLINE void store_weights(int m, VF low, VF high) {
    VF x[2] = {low, high};
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
#pragma GCC unroll 3
      for (int part = 0; part < P; part++) {
        if constexpr (P == 1) x[i] = (VF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded(x[i])), 16);
        Packed* even = weights + (i * 2 * w_rows + part * rows + m) * kWords;
        _mm512_store_si512(even, _mm512_srli_epi32((__m512i)x[i], 16));
        _mm512_store_si512(even + w_rows * kWords, (__m512i)high_part(x[i]));
        x[i] -= high_part(x[i]);
      }
  }
  static TILEWISE_INLINE __m256i rounded(VF x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }
  TILEWISE_INLINE void weigh_row(const TeamHead& head, const Scaling<2>& scaling, int m, VF (&x)[2], uint64_t seen) {
    Base::weigh_row(head, scaling, m, x, seen);
    if (parts == 1) return store_weights<1>(m, x[0], x[1]);
    parts == 2 ? store_weights<2>(m, x[0], x[1]) : store_weights<3>(m, x[0], x[1]);
  }
  void weigh(const KeyRows& block, const TeamHead& head, int turn) {
    const TeamPairs& at = pairs[turn];
    const Scaling<2> scaling([&](bool values, int i) { return load((values ? at.v : at.k) + i * W); }, this->factor);
    const float* from = scores[turn];
    if (q_columns == 1) {
      VF x[2] = {load(from), load(from + W)};
      return weigh_row(head, scaling, 0, x, this->seen_by(0, block));
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
      weigh_row(head, scaling, m, x, this->seen_by(m, block));
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

  int lines(const Ahead& ahead) const { return Words::kDecoded ? 0 : ahead.share(int64_t(task.heads) * steps); }
  void begin(TeamItem first, TeamItem) {
    Ahead ahead(blocks[first.block], 0, 0, 0);
    multiply<true, false>(find_keys(blocks[first.block], 0, 0), {}, nullptr, ahead, 0);
  }
  // While one head's weights meet its values, the next one's scores are computed.
  void step(TeamItem item, TeamItem next, TeamItem, int turn, Ahead& ahead, int lines) {
    const KeyRows& block = blocks[item.block];
    const ValueTiles values = find_values(block, item.head, turn);
    weigh(block, heads[item.head], turn);
    if (blocks[next.block].count)
      multiply<true, true>(find_keys(blocks[next.block], next.head, turn ^ 1), values, heads[item.head].out, ahead,
                           lines);
    else
      multiply<false, true>({}, values, heads[item.head].out, ahead, lines);
  }
  void end() {}
  void run() { run_team(*this); }
};

}  // namespace
}  // namespace tilewise::paged
