// A team on tiles of bytes, for codes of up to 8 bits and queries in bf16: half the products of tiles of bf16, and half
// the bytes that codes decode to.
//
// Products are exact sums of integers. A query is an integer of 22 bits relative to its largest channel, in three
// signed bytes; a weight, as it meets the values' codes, one of 16 bits relative to the largest of its block, in two
// unsigned ones. Operands stand as in team_words.h: S^T = K Q^T; O = P V with weights paired with zeros, here as (w, 0,
// 0, 0), (0, w, 0, 0), ..., so that a row of results is a quarter of the channels. Each block's results are added up in
// float.
#pragma once
#include "common/paged/cpu/bytes.h"
#include "common/paged/cpu/team.h"

namespace tilewise::paged {
namespace {

constexpr int kPlaces = 4;  // of bytes that a product sums

inline bool fits_bytes(const AttentionParams& p) {
  return p.type == Type::bf16 && team_rows(p) * kPlaces <= kTileRows;
}

// R: rows, as the compiler knows them; the last of a task's may stand for more than one.
template <class Source, class Visibility, int R>
struct ByteTeam : Team<Source, Visibility> {
  using Rows = Source;
  using Bytes = ByteRows<Source>;
  using Base = Team<Source, Visibility>;
  using Base::blocks, Base::heads, Base::places, Base::task;
  static constexpr int kQueryParts = 3, kWeightParts = 2, kMost = (1 << 8 * kWeightParts) - 1;
  static constexpr int kMaxSteps = kMaxHeadDim / kBytes;
  static constexpr int rows = R, q_columns = kQueryParts * R;
  static constexpr int kPart = kPlaces * R * W;                            // of weights for 16 keys
  static constexpr bool joined = kWeightParts * kPlaces * R <= kTileRows;  // both parts of weights fit one tile
  static constexpr int parts = 1;                                          // of sums in float

  // What the results of a head's block become.
  struct Pending {
    TeamHead* head = nullptr;
    float units[R];
  };

  Bytes bytes;
  int steps;
  char *k_room, *v_room;
  int32_t* weights;             // [low, high keys][part][place][row][W]
  TileRows keys[2], values[2];  // to be multiplied next
  Pending pending;
  alignas(64) int32_t scores[2][kTeamKeys * kTileRows];
  alignas(64) int32_t results[kMaxSteps * kWeightParts * kTileRows * W];  // [step][part][place][row][W]

  ByteTeam(const Task<Visibility>& task) : ByteTeam(task, Bytes(task.p.dim)) {}
  ByteTeam(const Task<Visibility>& task, Bytes bytes)
      : Base(task, R, kPlaces * R, bytes.units() * Bytes::kVectors * W),
        bytes(bytes),
        steps(bytes.units() * Bytes::kVectors) {
    for (int s = 0; s < steps; s++)
      for (int i = 0; i < kBytes; i++)
        if (const int d = Bytes::channel(s, i); d < task.p.dim)
          places[d] = i % kPlaces * rows * this->out_columns + s * W + i / kPlaces;
  }

  // ---- memory and queries ----

  bool start(const Runtime& rt) {
    const int64_t room = int64_t(steps) * kTeamKeys * kBytes, q = int64_t(steps) * kTileRows * q_columns;
    const int64_t w = 2 * kWeightParts * kPart;
    const int64_t words = w + task.heads * (q + this->state());
    k_room = scratch<char>(rt, 2, 2 * room + words * sizeof(int32_t));
    if (!k_room) return false;
    v_room = k_room + room;
    weights = reinterpret_cast<int32_t*>(v_room + room);
    this->share_out(weights + w, q, reinterpret_cast<float*>(weights + w + task.heads * q));
    for (int h = 0; h < task.heads; h++)
      for (int m = 0; m < rows; m++) pack_query(heads[h], task.of_head(h), m);
    return true;
  }

  // Relative to a power of two, so that bf16 stays exact down to 2^-14 of the largest channel.
  void pack_query(TeamHead& head, const Task<Visibility>& own, int m) {
    constexpr int kBits = 8 * kQueryParts - 3;
    constexpr float kLeast = 0x1p-100f;  // 2^kBits / it is a float
    float row[kMaxHeadDim + W];
    const int columns = steps * kBytes;
    this->load_query(head, own, m, row, columns);
    VF largest = {};
    for (int d = 0; d < columns; d += W) largest = max(largest, abs(load(row + d)));
    const float most = reduce_max(largest);
    if (most > 0 && most < kLeast) head.q_sums[m] = __builtin_nanf("");  // for another kernel to decide
    const float top = bits_to_float(float_to_bits(max_of(most, kLeast)) & 0x7f800000);
    const float inverse = float(1 << kBits) / top;
    head.q_units[m] = top / float(1 << kBits);
    int32_t* to = head.q + m;
    for (int s = 0; s < steps; s++)
      for (int i = 0; i < kBytes; i += W, to += W / kPlaces * q_columns) {
        VI x = (VI)_mm512_cvtps_epi32((__m512)(load(row + Bytes::channel(s, i)) * inverse));
        for (int part = kQueryParts - 1; part >= 0; part--) {
          alignas(16) int32_t digits[W / kPlaces];
          _mm_store_si128(reinterpret_cast<__m128i*>(digits), _mm512_cvtepi32_epi8((__m512i)x));
          for (int j = 0; j < W / kPlaces; j++) to[j * q_columns + part * rows] = digits[j];
          x = (x - (x << 24 >> 24)) >> 8;
        }
      }
  }

  // ---- keys and values ----

  // Sixteen keys, or values, from row i of the block on.
  TILEWISE_INLINE TileRows tile_rows(const KeyRows& block, const char* const* at, int64_t slot, int64_t head_bytes,
                                     int i, char* room) const {
    at += i;
    if (i + kTileRows <= block.count)
      return tile_rows(block, [at, head_bytes](int j) { return at[j] + head_bytes; }, slot, i, room);
    const int count = block.count - i;
    return tile_rows(block, [=](int j) { return j < count ? at[j] + head_bytes : kZeroRow; }, slot, i, room);
  }
  template <class Row>
  TILEWISE_INLINE TileRows tile_rows(const KeyRows& block, const Row& row, int64_t slot, int i, char* room) const {
    const Bytes local = bytes;  // stores to memory cannot change it
    if constexpr (Bytes::kDecoded)
      if (local.dim % kBytes == 0 && block.in_one_page(i, kTileRows, task.p.table.page_size))
        return {row(0), slot, kBytes};
    char* to = room + i * steps * kBytes;
    for (int u = 0; u < local.units(); u++) {
      const __mmask8 mask = local.code_mask(u);
#pragma GCC unroll 4
      for (int j = 0; j < kTileRows; j++) {
        const __m512i x = Bytes::load_unit(row(j), u, mask);
#pragma GCC unroll 2
        for (int v = 0; v < Bytes::kVectors; v++)
          _mm512_store_si512(to + ((u * Bytes::kVectors + v) * kTileRows + j) * kBytes, Bytes::decode(x, v));
      }
    }
    return {to, kBytes, kTileRows * kBytes};
  }
  TILEWISE_INLINE void find_keys(TeamItem item, int half) {
    const PageStrides& s = task.p.k_strides;
    const KeyRows& block = blocks[item.block];
    keys[half] = tile_rows(block, block.k, s.slot, item.head * s.head, half * kTileRows, k_room);
  }
  TILEWISE_INLINE void find_values(TeamItem item, int half) {
    const PageStrides& s = task.p.v_strides;
    const KeyRows& block = blocks[item.block];
    values[half] = tile_rows(block, block.v, s.slot, item.head * s.head, half * kTileRows, v_room);
  }
  TILEWISE_INLINE void multiply_keys(const int32_t* q, int32_t* to) const {
    const int64_t q_bytes = q_columns * sizeof(int32_t);
    zero_tile<0>();
    zero_tile<1>();
    for (int s = 0; s < steps; s++) {
      load_tile<2>(q + s * kTileRows * q_columns, q_bytes);
      load_tile<3>(keys[0].first + s * keys[0].step_bytes, keys[0].row_bytes);
      multiply_signed<0, 3, 2>();
      load_tile<3>(keys[1].first + s * keys[1].step_bytes, keys[1].row_bytes);
      multiply_signed<1, 3, 2>();
    }
    store_tile<0>(to, q_bytes);
    store_tile<1>(to + kTileRows * q_columns, q_bytes);
  }
  TILEWISE_INLINE void multiply_values() {
    if (!pending.head) return;
    if constexpr (!joined) return multiply_values_apart();
    constexpr int64_t half = kWeightParts * kPart;
    load_tile<6>(weights, kBytes);
    load_tile<7>(weights + half, kBytes);
    for (int s = 0; s < steps; s++) {
      zero_tile<5>();
      load_tile<4>(values[0].first + s * values[0].step_bytes, values[0].row_bytes);
      multiply_unsigned<5, 6, 4>();
      load_tile<4>(values[1].first + s * values[1].step_bytes, values[1].row_bytes);
      multiply_unsigned<5, 7, 4>();
      store_tile<5>(results + s * half, kBytes);
    }
  }
  TILEWISE_INLINE void multiply_values_apart() {
    for (int s = 0; s < steps; s++) {
      zero_tile<5>();
      zero_tile<7>();
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) {
        load_tile<4>(values[i].first + s * values[i].step_bytes, values[i].row_bytes);
        load_tile<6>(weights + 2 * i * kPart, kBytes);
        multiply_unsigned<5, 6, 4>();
        load_tile<6>(weights + (2 * i + 1) * kPart, kBytes);
        multiply_unsigned<7, 6, 4>();
      }
      store_tile<5>(results + s * kWeightParts * kPart, kBytes);
      store_tile<7>(results + (s * kWeightParts + 1) * kPart, kBytes);
    }
  }

  // ---- weights ----

  // Weights as integers relative to their largest; returns what 1 stands for.
  TILEWISE_INLINE float store_weights(int m, const VF (&x)[2]) {
    constexpr float kLeast = 0x1p-110f;  // kMost / it is a float
    const float top = max_of(reduce_max(max(x[0], x[1])), kLeast);
    const VF inverse = set1(kMost / top);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      const __m512i code = _mm512_cvtps_epi32((__m512)(x[i] * inverse));
      const __m512i digits[kWeightParts] = {_mm512_srli_epi32(code, 8), _mm512_and_si512(code, _mm512_set1_epi32(255))};
#pragma GCC unroll 2
      for (int part = 0; part < kWeightParts; part++)
#pragma GCC unroll 4
        for (int place = 0; place < kPlaces; place++)
          _mm512_store_si512(weights + (((i * kWeightParts + part) * kPlaces + place) * rows + m) * W,
                             _mm512_slli_epi32(digits[part], 8 * place));
    }
    return top * (1.f / kMost);
  }

  // Integers in three digits.
  static TILEWISE_INLINE VF join(VF high, VF middle, VF low) {
    return __builtin_convertvector(((VI)high << 8) + (VI)middle, VF) * 256.f + __builtin_convertvector((VI)low, VF);
  }
  // [key][column] to columns of 16 keys.
  static TILEWISE_INLINE void turn_scores(const int32_t* from, VF (&columns)[q_columns][2]) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++, from += kTileRows * q_columns)
#pragma GCC unroll 4
      for (int c = 0; c < q_columns; c += 4) {  // of the last, only what is there
        VF four[4];
        load_columns([&](int j) { return reinterpret_cast<const float*>(from) + j * q_columns + c; }, 0, four);
#pragma GCC unroll 4
        for (int j = 0; j < min_of(4, q_columns - c); j++) columns[c + j][i] = four[j];
      }
  }
  TILEWISE_INLINE void weigh(TeamItem item, int turn) {
    const KeyRows& block = blocks[item.block];
    TeamHead& head = heads[item.head];
    const auto scaling = this->scaling(bytes, block, item.head);
    VF turned[q_columns][2];
    turn_scores(scores[turn], turned);
    pending.head = &head;
#pragma GCC unroll 4
    for (int m = 0; m < R; m++) {
      VF x[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++)
        x[i] = join(turned[m][i], turned[m + rows][i], turned[m + 2 * rows][i]) * head.q_units[m];
      this->weigh_row(head, scaling, m, x, this->seen_by(min_of(m, task.rows - 1), block));
      pending.units[m] = store_weights(m, x);
    }
  }
  // Adds the results of the block before to the output.
  TILEWISE_INLINE void settle() {
    if (!pending.head) return;
    const int columns = this->out_columns;
#pragma GCC unroll 4
    for (int m = 0; m < R; m++) {
      const VF unit = set1(pending.units[m]);
      float* to = pending.head->out + m * columns;
      const int32_t* from = results + m * W;
      for (int s = 0; s < steps; s++, from += kWeightParts * kPart)
#pragma GCC unroll 4
        for (int place = 0; place < kPlaces; place++) {
          float* at = to + place * rows * columns + s * W;
          const VI sum = (load(from + place * rows * W) << 8) + load(from + place * rows * W + kPart);
          store(at, load(at) + __builtin_convertvector(sum, VF) * unit);
        }
    }
  }

  // ---- all of it ----

  // Tiles 0 to 2: keys x rows, and queries; 3 and 4: keys, values; 5 to 7: rows x values, and weights.
  TileConfig tile_sizes() const {
    TileConfig sizes;
    for (int i = 0; i < 3; i++) sizes.row_bytes[i] = uint16_t(q_columns * sizeof(int32_t));
    for (int i = 5; i < 8; i++) sizes.rows[i] = uint8_t((joined ? kWeightParts : 1) * kPlaces * R);
    return sizes;
  }
  static constexpr int kAsks = 8;  // of a step, for lines of the next block: fewer than 16 at a time
  int lines(const Ahead& ahead) const { return ahead.share(int64_t(task.heads) * kAsks); }
  void begin(TeamItem first, TeamItem second) {
    for (int i = 0; i < 2; i++) find_keys(first, i);
    multiply_keys(heads[first.head].q, scores[0]);
    for (int i = 0; i < 2; i++) find_keys(second, i);
  }
  // Nothing waits for what has just begun: the tiles work on what the steps before have prepared, while this one
  // prepares what comes after.
  TILEWISE_INLINE void step(TeamItem item, TeamItem next, TeamItem after, int turn, Ahead& ahead, int lines) {
    multiply_keys(heads[next.head].q, scores[turn ^ 1]);
    ahead.go_on(lines);
    multiply_values();
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      ahead.go_on(lines);
      find_values(item, i);
      ahead.go_on(lines);
      find_keys(after, i);
    }
    ahead.go_on(lines);
    settle();
    ahead.go_on(lines);
    weigh(item, turn);
    ahead.go_on(lines);
  }
  void end() {
    multiply_values();
    settle();
  }
  void run() { run_team(*this); }
};

}  // namespace
}  // namespace tilewise::paged
