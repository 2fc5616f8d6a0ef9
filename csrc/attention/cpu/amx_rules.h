// The rules of a call as a policy of tile kernels (common/tile_attention.h), whose rows are queries.
#pragma once
#include "attention/cpu/rules.h"
#include "common/tile_attention.h"

namespace tilewise {
namespace {

constexpr int kKeptRows = 2 * kTileRows;
constexpr int kKeptWords = kMaxBlockKeys / 32 * kKeptRows;  // of a tile and a block

// Which weights dropout keeps: bit j of to[row] belongs to key + j, for kKeptRows rows from `row` on.
inline void kept_bits(const HeadRules& rules, int64_t row, int64_t key, int32_t* to) {
  for (int i = 0; i < kKeptRows; i += W) {
    VI bits = {};
    for (int group = 0; group < 32; group += 8) {
      VU words[4];
      rules.random(row + i, key + group, words);
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) bits |= rules.keeps(words, j) & set1i(int32_t(1u << (group + j)));
    }
    store(to + i, bits);
  }
}

// Rows from `row`, keys from `key` of the sequence on.
struct Ruled {
  const HeadRules& rules;
  int64_t row, key;
  bool masked;          // whether the rules have to be asked for what is added
  const int32_t* kept;  // [key / 32][kKeptRows] bits, where there is dropout

  TILEWISE_INLINE VF adjusted(VF score, int i, int j) const {
    return masked ? rules.adjusted(score, row + i, key + j) : score;
  }
  TILEWISE_INLINE VF keep(VF weight, int i, int j) const {
    const auto bits = __mmask16(uint32_t(kept[j / 32 * kKeptRows + i]) >> j % 32);
    return (VF)_mm512_maskz_mul_ps(bits, (__m512)weight, (__m512)set1(rules.keep_scale()));
  }
};

// Of the rules, on keys that are all seen, a bias alone.
template <class T>
struct Biased {
  const T* from;  // of the tile and block; rows are `stride` apart
  int64_t stride, ahead;
};
template <class T>
Biased(const T*, int64_t, int64_t) -> Biased<T>;
template <class T>
TILEWISE_INLINE VF seen_score(const Biased<T>& to, VF score, VF reference, int i, int j) {
  return score + HeadRules::bias_ahead(to.from + i * to.stride + j, to.ahead) - reference;
}

// Of the rules a mask alone, of whole words.
struct Masked {
  const uint32_t* from;  // of the tile and block; rows are `stride` apart
  int64_t stride;
};
TILEWISE_INLINE VF seen_score(const Masked& to, VF score, VF reference, int i, int j) {
  const auto bits = __mmask16(to.from[i * to.stride + j / 32] >> j % 32);
  return (VF)_mm512_mask_sub_ps((__m512)set1(-kInfinity), bits, (__m512)score, (__m512)reference);
}

TILEWISE_INLINE VF seen_score(const Ruled& to, VF score, VF reference, int i, int j) {
  if (to.rules.caps()) score = to.rules.cap(score);
  return to.adjusted(score, i, j) - reference;
}
TILEWISE_INLINE VF met_weight(const Ruled& to, VF weight, int i, int j) {
  return to.rules.drops() ? to.keep(weight, i, j) : weight;
}

}  // namespace
}  // namespace tilewise
