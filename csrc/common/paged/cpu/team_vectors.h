// A team whose heads have one row each, on vectors of bytes (AVX-512 VNNI and GFNI): plain decoding over codes of up to
// 8 bits. With one row an AMX product uses 3 of its 16 columns, and what it needs around it costs more than itself.
//
// Products are exact sums of integers, as in team_bytes.h: a query is three signed bytes a channel, a weight two
// unsigned ones, relative to the largest of its block.
//  - Scores: a key is decoded in two instructions and multiplied by the bytes of the query from the highest on, the sum
//    shifted by 8 before the next. Additions wrap, so only the final sum has to fit 32 bits. Codes are the unsigned
//    operands, 128 too large; so much too large is each sum, times the sum of the query's integers.
//  - Outputs: four values are interleaved byte by byte before they are decoded, so that a product adds up four keys.
//    The sums of a block stay in registers, as integers.
#pragma once
#include "common/paged/cpu/bytes.h"
#include "common/paged/cpu/team.h"

namespace tilewise::paged {
namespace {

constexpr int kVectorKeys = 64;
constexpr Share kVectorShare = {8, kVectorKeys, 1024};

// One of log2(W) rounds that add up 16 vectors: groups of N lanes of `a` and `b`, each plus its neighbour, in turn.
template <int N>
TILEWISE_INLINE VI add_neighbours(VI a, VI b) {
  constexpr int kOfB = N == 8 ? 0xff00 : N == 4 ? 0xf0f0 : N == 2 ? 0xcccc : 0xaaaa;
  const __m512i x = (__m512i)a, y = (__m512i)b, own = _mm512_mask_blend_epi32(kOfB, x, y);  // not on the shuffles' port
  if constexpr (N == 8) return (VI)own + (VI)_mm512_shuffle_i64x2(x, y, 0x4e);
  if constexpr (N == 2) return (VI)own + (VI)_mm512_shuffle_pd((__m512d)x, (__m512d)y, 0x55);
  VI other;
  for (int i = 0; i < W; i++) other[i] = (i & N ? W : 0) + (i ^ N);
  return (VI)own + (VI)_mm512_permutex2var_epi32(x, (__m512i)other, y);
}

// Units: of a row, at least; Whole: rows have just these.
template <class Source, class Visibility, int Units, bool Whole>
struct VectorTeam : Team<Source, Visibility, kVectorKeys> {
  using Rows = Source;
  using Bytes = ByteRows<Source>;
  using Base = Team<Source, Visibility, kVectorKeys>;
  using Base::blocks, Base::heads, Base::kVectors, Base::task;
  static constexpr int kSteps = Units * Bytes::kVectors;   // vectors of bytes that a row decodes to
  static constexpr int kParts = 3, kMost = 0xffff;         // of a query; the largest weight
  static constexpr int kSums = Bytes::kBits == 8 ? 2 : 1;  // of a key: the query's highest part apart, or all in one
  static constexpr int kFour = 4, kAsks = kVectorKeys / kFour;
  static constexpr int64_t kQuery = (kParts * kSteps + kSums) * W;  // words: [part][step][W], then each sum's excess
  static constexpr int parts = 1;

  Bytes bytes;
  __mmask8 codes[Units];                       // what of a unit is a row's
  alignas(64) int8_t weights[2][kVectorKeys];  // [high, low][key]

  VectorTeam(const Task<Visibility>& task) : Base(task, 1, 1, kSteps * kBytes), bytes(task.p.dim) {
    for (int u = 0; u < Units; u++) codes[u] = bytes.code_mask(u);
  }

  // ---- memory and queries ----

  bool start(const Runtime& rt) {
    int32_t* room = scratch<int32_t>(rt, 2, task.heads * (kQuery + this->state()));
    if (!room) return false;
    this->share_out(room, kQuery, reinterpret_cast<float*>(room + task.heads * kQuery));
    for (int h = 0; h < task.heads; h++) pack_query(heads[h], task.of_head(h));
    return true;
  }

  // Relative to a power of two, so that bf16 stays exact down to 2^-14 of the largest channel; a few bits less where
  // the sum of products with codes might not fit 32 bits.
  void pack_query(TeamHead& head, const Task<Visibility>& own) {
    constexpr int kBits = 8 * kParts - 2;
    constexpr float kLargest = 127 * 0x10101;                            // in three signed bytes
    constexpr float kLeast = 0x1p-100f;                                  // 2^kBits / it is a float
    constexpr float kRoom = 0.999f * float(1ll << (32 - Bytes::kBits));  // for the sum of the query's integers
    constexpr int kColumns = kSteps * kBytes;
    float row[kMaxHeadDim + W];
    this->load_query(head, own, 0, row, kColumns);
    VF largest = {}, sum = {};
    for (int d = 0; d < kColumns; d += W) {
      largest = max(largest, abs(load(row + d)));
      sum += abs(load(row + d));
    }
    const float most = reduce_max(largest);
    if (most > 0 && most < kLeast) head.q_sums[0] = __builtin_nanf("");  // for another kernel to decide
    const float top = bits_to_float(float_to_bits(max_of(most, kLeast)) & 0x7f800000), size = reduce_add(sum) / top;
    int bits = kBits;
    while (bits > 0 && (most / top * float(1 << bits) > kLargest || (kSums == 1 && size * float(1 << bits) > kRoom)))
      bits--;
    const float inverse = float(1 << bits) / top;
    head.q_units[0] = top / float(1 << bits);
    VI excess[kSums] = {};
    for (int s = 0; s < kSteps; s++)
      for (int i = 0; i < kBytes; i += W) {
        VI x = (VI)_mm512_cvtps_epi32((__m512)(load(row + Bytes::channel(s, i)) * inverse));
        if constexpr (kSums == 1) excess[0] += x;
        for (int part = kParts - 1; part >= 0; part--) {
          char* to = reinterpret_cast<char*>(head.q + (part * kSteps + s) * W) + i;
          const VI digit = part ? x << 24 >> 24 : x;
          _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)digit));
          if constexpr (kSums == 2) excess[part > 0] += part == 1 ? digit << 8 : digit;
          x = (x - digit) >> 8;
        }
      }
    for (int i = 0; i < kSums; i++) {
      const uint32_t all = uint32_t(_mm512_reduce_add_epi32((__m512i)excess[i]));
      store(head.q + (kParts * kSteps + i) * W, set1i(int32_t(all * 128)));
    }
  }

  // ---- keys ----

  struct Sums {
    VI of[kSums];
  };
  // The rows of a block's keys or values of one head; whoever reads some asks for some lines of the next block.
  struct HeadRows {
    const char* const* at;
    int64_t head_bytes;
    Ahead& ahead;
    int lines;
    const char* operator[](int i) const { return at[i] + head_bytes; }
  };

  TILEWISE_INLINE Sums multiply_key(const int32_t* q, const char* row) const {
    VI x[kSteps];
#pragma GCC unroll 4
    for (int u = 0; u < Units; u++) {
      const __m512i unit = Bytes::template load_unit<Whole>(row, u, codes[u]);
#pragma GCC unroll 2
      for (int v = 0; v < Bytes::kVectors; v++) x[u * Bytes::kVectors + v] = (VI)Bytes::decode_biased(unit, v);
    }
    Sums sums = {};
#pragma GCC unroll 3
    for (int part = 0; part < kParts; part++) {
      VI& sum = sums.of[part > 0 ? kSums - 1 : 0];
      sum <<= 8;
#pragma GCC unroll 4
      for (int s = 0; s < kSteps; s++)
        sum = (VI)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x[s], _mm512_load_si512(q + (part * kSteps + s) * W));
    }
    return sums;
  }
  // Keys `first`, first + N, ... of 16, each in its lanes.
  template <int N>
  TILEWISE_INLINE Sums multiply_keys(const int32_t* q, const HeadRows& rows, int first) const {
    if constexpr (N == kFour) rows.ahead.go_on(rows.lines);
    if constexpr (N == W) {
      return multiply_key(q, rows[first]);
    } else {
      const Sums a = multiply_keys<2 * N>(q, rows, first), b = multiply_keys<2 * N>(q, rows, first + N);
      Sums both;
#pragma GCC unroll 2
      for (int i = 0; i < kSums; i++) both.of[i] = add_neighbours<N>(a.of[i], b.of[i]);
      return both;
    }
  }
  TILEWISE_INLINE VF score(const TeamHead& head, const HeadRows& rows) const {
    const Sums sums = multiply_keys<1>(head.q, rows, 0);
    const int32_t* excess = head.q + kParts * kSteps * W;
    const VF low = __builtin_convertvector(sums.of[kSums - 1] - load(excess + (kSums - 1) * W), VF);
    if constexpr (kSums == 1) return low;
    return __builtin_convertvector(sums.of[0] - load(excess), VF) * 65536.f + low;
  }

  // ---- weights ----

  // Weights as integers relative to their largest; returns what 1 stands for.
  TILEWISE_INLINE float store_weights(const VF (&x)[kVectors]) {
    constexpr float kLeast = 0x1p-110f;  // kMost / it is a float
    VF largest = x[0];
#pragma GCC unroll 4
    for (int i = 1; i < kVectors; i++) largest = max(largest, x[i]);
    const float top = max_of(reduce_max(largest), kLeast);
    const VF inverse = set1(kMost / top);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; i++) {
      const __m512i code = _mm512_cvtps_epi32((__m512)(x[i] * inverse));
      const __m512i digits[2] = {_mm512_srli_epi32(code, 8), code};
#pragma GCC unroll 2
      for (int part = 0; part < 2; part++)
        _mm_store_si128(reinterpret_cast<__m128i*>(weights[part] + i * W), _mm512_cvtepi32_epi8(digits[part]));
    }
    return top * (1.f / kMost);
  }

  // ---- values ----

  // Four rows: byte i of vector j belongs to row i % 4 and its byte i / 16 * 16 + j * 4 + i % 16 / 4.
  TILEWISE_INLINE void interleave(const HeadRows& rows, int unit, VI (&x)[kFour]) const {
    __m512i row[kFour];
#pragma GCC unroll 4
    for (int i = 0; i < kFour; i++) row[i] = Bytes::template load_unit<Whole>(rows[i], unit, codes[unit]);
    const __m512i low[2] = {_mm512_unpacklo_epi8(row[0], row[1]), _mm512_unpacklo_epi8(row[2], row[3])};
    const __m512i high[2] = {_mm512_unpackhi_epi8(row[0], row[1]), _mm512_unpackhi_epi8(row[2], row[3])};
    x[0] = (VI)_mm512_unpacklo_epi16(low[0], low[1]);
    x[1] = (VI)_mm512_unpackhi_epi16(low[0], low[1]);
    x[2] = (VI)_mm512_unpacklo_epi16(high[0], high[1]);
    x[3] = (VI)_mm512_unpackhi_epi16(high[0], high[1]);
  }
  // `out` as [step][vector of interleave()][W].
  TILEWISE_INLINE void add_values(float* out, HeadRows rows, int unit, float weight_unit) const {
    constexpr int kOut = Bytes::kVectors * kFour;
    VI sums[2][kOut];
#pragma GCC unroll 16
    for (int i = 0; i < 2 * kOut; i++) sums[i / kOut][i % kOut] = VI{};
    const int8_t* weight = weights[0];
#pragma GCC unroll 1
    for (; weight < weights[1]; rows.at += kFour, weight += kFour) {
      rows.ahead.go_on(rows.lines);
      VI x[kFour];
      interleave(rows, unit, x);
      int32_t high, low;
      __builtin_memcpy(&high, weight, kFour);
      __builtin_memcpy(&low, weight + kVectorKeys, kFour);
#pragma GCC unroll 8
      for (int i = 0; i < kOut; i++) {
        const __m512i value = Bytes::decode((__m512i)x[i % kFour], i / kFour);
        sums[0][i] = (VI)_mm512_dpbusd_epi32((__m512i)sums[0][i], _mm512_set1_epi32(high), value);
        sums[1][i] = (VI)_mm512_dpbusd_epi32((__m512i)sums[1][i], _mm512_set1_epi32(low), value);
      }
    }
    out += unit * kOut * W;
#pragma GCC unroll 8
    for (int i = 0; i < kOut; i++) {
      const VI sum = (sums[0][i] << 8) + sums[1][i];
      store(out + i * W, load(out + i * W) + __builtin_convertvector(sum, VF) * set1(weight_unit));
    }
  }

  // ---- all of it ----

  // Whole fours: what is missing stands for the last key and has no weight.
  void find(KeyRows& block, int64_t from) const {
    Base::find(block, from);
    if (block.count)
      for (int j = block.count; j < kVectorKeys; j++)
        block.k[j] = block.k[block.count - 1], block.v[j] = block.v[block.count - 1];
  }
  void run() {
    KeyRows& coming = blocks[2];  // the keys of the task that follows
    find(blocks[0], task.keys.first);
    for (int turn = 0; blocks[turn].count; turn ^= 1) {
      KeyRows &now = blocks[turn], &next = blocks[turn ^ 1];
      find(next, now.first + now.count);
      if (!next.count) coming.find(task, task.keys.end, min_of(task.follow, task.keys.end + kVectorKeys), bytes);
      Ahead ahead(next.count ? next : coming, task.p.k_strides.head, task.p.v_strides.head, task.heads);
      const int lines = ahead.share(int64_t(task.heads) * kAsks * (1 + Units));
      for (int h = 0; h < task.heads; h++) attend(now, h, ahead, lines);
    }
  }
  TILEWISE_INLINE void attend(const KeyRows& block, int h, Ahead& ahead, int lines) {
    TeamHead& head = heads[h];
    const int64_t k_head = h * task.p.k_strides.head, v_head = h * task.p.v_strides.head;
    VF x[kVectors];
    for (int i = 0; i < kVectors; i++) x[i] = score(head, {block.k + i * W, k_head, ahead, lines}) * head.q_units[0];
    this->weigh_row(head, this->scaling(bytes, block, h), 0, x, this->seen_by(0, block));
    const float unit = store_weights(x);
    for (int u = 0; u < Units; u++) add_values(head.out, {block.v, v_head, ahead, lines}, u, unit);
  }

  void write(const TeamHead& head, const Task<Visibility>& own, int) const {
    float row[kSteps * kBytes + W];
    const VF zero = set1(reduce_add(load(head.zeros)));
    for (int s = 0; s < kSteps; s++)
      for (int i = 0; i < kBytes; i += kFour) {
        const float* from = head.out + (s * kFour + i % W / kFour) * W + i / W * kFour;
        _mm_storeu_ps(row + Bytes::channel(s, i), _mm_loadu_ps(from));
      }
    for (int d = 0; d < kSteps * kBytes; d += W) store(row + d, load(row + d) + zero);
    own.write(0, row, head.reference[0], reduce_add(load(head.sums)));
  }
};

}  // namespace
}  // namespace tilewise::paged
