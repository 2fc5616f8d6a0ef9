// What the rules of a call (params.h) say about one head of one sequence: which keys a range of rows can see at all, so
// that whole blocks are skipped, and, row by row, what is added to scores. Scores are in base 2.
#pragma once
#include "attention/cpu/problem.h"
#include "common/philox.h"
#include "common/transpose.h"

namespace tilewise {
namespace {

constexpr float kLowest = -3.402823466e38f;
constexpr float kFloatLog2e = 1.44269504088896341f;

// Within 2 ulp, on both sides of zero and for all sizes; NaN gives NaN.
TILEWISE_INLINE VF tanh(VF x) {
  const VF size = abs(x), square = x * x;
  // Small: an odd polynomial, for 1 - 2 / (exp(2 x) + 1) would cancel.
  VF p = set1(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const VF small = p * square * x + x;
  const VF large = 1 - 2 / (exp2(min(set1(10), size) * (2 * kFloatLog2e)) + 1);
  const VF signed_large = (VF)((VI)large | ((VI)x & set1i(INT32_MIN)));
  return select(size < set1(0.625f), small, signed_large);
}

enum class Sight { none, some, all };
struct Span {
  Sight sight;
  int64_t end;  // of the keys for which it holds
};

class HeadRules {
 public:
  HeadRules(const ForwardParams& p, const Sequence& seq, int64_t head)
      : r_(p.rules), keys_(seq.keys), queries_(seq.queries), diagonal_(int64_t(seq.keys) - seq.queries) {
    left_ = r_.window_left == kUnlimited ? INT32_MAX : r_.window_left;
    right_ = r_.window_right == kUnlimited ? INT32_MAX : r_.window_right;
    const int64_t b = seq.number;
    if (r_.alibi_slopes) slope_ = r_.alibi_slopes[b * r_.alibi_batch + head] * kFloatLog2e;
    if (r_.bias)
      bias_ = static_cast<const char*>(r_.bias) + (b * r_.bias_batch + head * r_.bias_head) * size_of(r_.bias_type);
    if (r_.mask) mask_ = r_.mask + b * r_.mask_batch + head * r_.mask_head;
    if (r_.blocks) blocks_ = r_.blocks + b * r_.blocks_batch + head * r_.blocks_head;
    if (r_.sink_logits) sink_ = r_.sink_logits[head];
    if (r_.softcap > 0) cap_ = r_.softcap * kFloatLog2e;
    if (r_.dropout_threshold > 0) random_ = Philox(uint64_t(*r_.dropout_seed));
    if (r_.dropout_threshold < 65536) keep_scale_ = 65536.f / (65536 - r_.dropout_threshold);
    hides_ = r_.window_left != kUnlimited || r_.window_right != kUnlimited || mask_ || blocks_;
    head_ = uint32_t(b * p.q_heads + head);
  }

  float sink() const { return sink_; }  // natural logarithm; -inf: none
  bool caps() const { return cap_ > 0; }
  bool drops() const { return r_.dropout_threshold > 0; }
  // Whether scores change where they are seen, so that no block of keys is plain.
  bool changes_scores() const { return bias_ || r_.alibi_slopes || caps(); }
  bool adds() const { return bias_ || r_.alibi_slopes; }

  // What rows [first, last] see of the keys from `key` on, up to the end of the span.
  Span look(int64_t first, int64_t last, int64_t key) const {
    last = min_of<int64_t>(last, queries_ - 1);
    Span span = {Sight::all, keys_};
    auto narrow = [&](Sight sight, int64_t end) {
      span.sight = sight < span.sight ? sight : span.sight;
      span.end = min_of(span.end, end);
    };
    const int64_t near_end = first + diagonal_ + right_ + 1, far_end = last + diagonal_ + right_ + 1;
    if (key >= far_end) return {Sight::none, keys_};
    key < near_end ? narrow(Sight::all, near_end) : narrow(Sight::some, far_end);
    const int64_t near_begin = first + diagonal_ - left_, far_begin = last + diagonal_ - left_;
    if (key < far_begin && key < r_.global_tokens)
      narrow(Sight::all, r_.global_tokens);
    else if (key < near_begin)
      return {Sight::none, min_of(near_begin, keys_)};
    else if (key < far_begin)
      narrow(Sight::some, far_begin);
    if (mask_) narrow(Sight::some, keys_);
    if (blocks_) {
      const int64_t column = key / r_.block_k;
      int active = 0, rows = 0;
      for (int64_t i = first / r_.block_q; i <= last / r_.block_q; i++, rows++)
        active += blocks_[i * r_.blocks_row + column] != 0;
      narrow(active == 0 ? Sight::none : active < rows ? Sight::some : Sight::all, (column + 1) * r_.block_k);
    }
    return span;
  }

  // The first key from `key` on that some row of [first, last] may see; the number of keys if there is none.
  int64_t next_seen(int64_t first, int64_t last, int64_t key) const {
    while (key < keys_) {
      const Span span = look(first, last, key);
      if (span.sight != Sight::none) break;
      key = span.end;
    }
    return min_of(key, keys_);
  }

  // What rows [first, last] see of the keys [key, end).
  Sight over(int64_t first, int64_t last, int64_t key, int64_t end) const {
    const Span start = look(first, last, key);
    Span span = start;
    while (span.sight == start.sight && span.end < end) span = look(first, last, span.end);
    return span.sight == start.sight ? span.sight : Sight::some;
  }

  // Scores of a row and the keys [key, key + W) with what the rules add, -inf where hidden; key is a multiple of W.
  // Keys that do not exist are hidden; rows may be asked for that do not exist.
  TILEWISE_INLINE VF adjusted(VF score, int64_t row, int64_t key) const {
    row = min_of(row, queries_ - 1);
    const VI from_diagonal = iota() + set1i(int32_t(key - row - diagonal_));
    if (bias_) score += bias(row, key);
    if (r_.alibi_slopes) score -= (VF)abs(__builtin_convertvector(from_diagonal, VF)) * slope_;
    if (!hides_ && key + W <= keys_) return score;
    return select(seen(row, key, from_diagonal), score, set1(-kInfinity));
  }

  // The same in two steps: adjusted(score, row, key) is added(score, extra(row, key)).
  TILEWISE_INLINE VF extra(int64_t row, int64_t key) const { return adjusted(VF{}, row, key); }
  TILEWISE_INLINE static VF added(VF score, VF extra) {
    return select(extra == set1(-kInfinity), extra, score + extra);
  }

  // extra(row + i, key + j) for i and j < W, turned on the diagonal: to(j, of rows [row, row + W)).
  template <class F>
  TILEWISE_INLINE void extras(int64_t row, int64_t key, const F& to) const {
    if (only_biased() && row + W <= queries_ && key + W <= keys_)
      return with_bias(row, key, [&](const auto* from) { turn(from, to); });
    VF extras[W];
#pragma GCC unroll 1
    for (int i = 0; i < W; i++) extras[i] = extra(row + i, key);
    transpose(extras);
#pragma GCC unroll 16
    for (int j = 0; j < W; j++) to(j, extras[j]);
  }

  // Whether seen scores change by a bias alone, whose keys lie side by side. with_bias(row, key, f) then calls f with
  // where it stands, typed; rows are bias_stride() apart.
  bool plainly_biased() const { return bias_ && r_.bias_key == 1 && !r_.alibi_slopes && !caps(); }
  template <class F>
  TILEWISE_INLINE void with_bias(int64_t row, int64_t key, const F& f) const {
    const char* from = bias_ + (row * r_.bias_row + key) * size_of(r_.bias_type);
    switch (r_.bias_type) {
      case Type::f32: return f(reinterpret_cast<const float*>(from));
      case Type::f16: return f(reinterpret_cast<const Fp16*>(from));
      default: return f(reinterpret_cast<const Bf16*>(from));
    }
  }
  int64_t bias_stride() const { return r_.bias_row; }
  int64_t ahead(int64_t row) const { return row < last_tile_ ? next_tile_ : next_block_; }  // bytes
  // W keys of a row of such a bias; asks for those `ahead` bytes behind.
  template <class T>
  TILEWISE_INLINE static VF bias_ahead(const T* from, int64_t ahead) {
    __builtin_prefetch(reinterpret_cast<const char*>(from) + ahead, 0, 2);
    return in_base_2(load(from));
  }

  // Whether scores are hidden or have a bias added, and no more. (Those of ALiBi rise along a row.)
  bool only_adds() const { return !caps() && !r_.alibi_slopes && !drops(); }

  // Whether a bias is all that changes scores, and what of it to ask for ahead of row and key; rows are `stride` bytes
  // apart.
  bool only_biased() const { return plainly_biased() && !hides_; }
  int bias_bytes() const { return size_of(r_.bias_type); }
  const char* bias_to_come(int64_t row, int64_t key, int64_t& stride) const {
    stride = r_.bias_row * size_of(r_.bias_type);
    return bias_ + row * stride + key * size_of(r_.bias_type) + ahead(row);
  }

  // Whether a mask is all there is.
  bool only_masks() const {
    const bool windows = r_.window_left != kUnlimited || r_.window_right != kUnlimited;
    return mask_ && !windows && !blocks_ && !changes_scores() && !drops();
  }
  // Rows may be asked for that do not exist.
  const uint32_t* mask_row(int64_t row) const { return mask_ + min_of(row, queries_ - 1) * r_.mask_row; }
  int64_t mask_stride() const { return r_.mask_row; }

  // softcap * tanh(score / softcap); its derivative is 1 - tanh^2.
  TILEWISE_INLINE VF cap(VF score, VF& derivative) const {
    const VF t = tanh(score / cap_);
    derivative = 1 - t * t;
    return t * cap_;
  }
  TILEWISE_INLINE VF cap(VF score) const { return tanh(score / cap_) * cap_; }

  // The random words of eight keys from `key`, a multiple of 8, on, for rows [row, row + W).
  TILEWISE_INLINE void random(int64_t row, int64_t key, VU (&words)[4]) const {
    random_.words(VU{} + uint32_t(key / 8), (VU)iota() + uint32_t(row), VU{} + head_, words);
  }
  // Whether dropout keeps the weights of key i of these eight, and what it multiplies those it keeps by.
  TILEWISE_INLINE VI keeps(const VU (&words)[4], int i) const {
    return (VI)(words[i / 2] >> (i % 2 * 16) & 0xffff) >= set1i(r_.dropout_threshold);
  }
  // Rows of a bias are far apart and read a block of keys at a time, which no hardware foresees: while a tile of `rows`
  // of [first, last] is used, what the next one needs is asked for, for the last one that of the first and the next
  // block. (No earlier: rows a power of two apart share sets of the caches, which hold no block of a whole task.)
  void foresee(int64_t first, int64_t last, int rows, int64_t keys) {
    if (!r_.bias) return;
    last_tile_ = first + (last - first) / rows * rows;
    next_tile_ = rows * r_.bias_row * size_of(r_.bias_type);
    next_block_ = (keys * r_.bias_key - (last_tile_ - first) * r_.bias_row) * size_of(r_.bias_type);
  }

  float keep_scale() const { return keep_scale_; }

 private:
  const Rules& r_;
  int64_t keys_, queries_, diagonal_;
  int64_t left_, right_;
  bool hides_;
  float slope_ = 0, sink_ = -kInfinity, cap_ = 0, keep_scale_ = 0;
  const char* bias_ = nullptr;
  int64_t last_tile_ = 0, next_tile_ = 0, next_block_ = 0;  // a row; bytes from a place in one tile to that in the next
  const uint32_t* mask_ = nullptr;
  const uint8_t* blocks_ = nullptr;
  Philox random_;
  uint32_t head_;

  static int size_of(Type type) { return type == Type::f32 ? 4 : 2; }

  // A bias below all finite scores hides a key by its size alone, unless all are as low: it stays finite. (-inf times
  // zero is NaN, beside which max() returns the other.)
  TILEWISE_INLINE static VF in_base_2(VF bias) { return max(bias * set1(0) + kLowest, bias * kFloatLog2e); }

  template <class T, class F>
  TILEWISE_INLINE void turn(const T* from, const F& to) const {
    VF columns[W];
    load_turned([&](int i) { return from + i * r_.bias_row; }, columns);
#pragma GCC unroll 16
    for (int j = 0; j < W; j++) to(j, in_base_2(columns[j]));
  }

  TILEWISE_INLINE VF bias(int64_t row, int64_t key) const {
    const char* from = bias_ + (row * r_.bias_row + key * r_.bias_key) * size_of(r_.bias_type);
    const int64_t count = keys_ - key;
    __builtin_prefetch(from + ahead(row), 0, 2);
    VF value;
    switch (r_.bias_type) {
      case Type::f32: value = spread(reinterpret_cast<const float*>(from), count); break;
      case Type::f16: value = spread(reinterpret_cast<const Fp16*>(from), count); break;
      default: value = spread(reinterpret_cast<const Bf16*>(from), count);
    }
    return in_base_2(value);
  }
  template <class T>
  TILEWISE_INLINE VF spread(const T* from, int64_t count) const {
    if (r_.bias_key == 1) return count >= W ? load(from) : load(from, count);
    if (r_.bias_key == 0) return set1(to_float(*from));
    VF value = {};
    for (int i = 0; i < W && i < count; i++) value[i] = to_float(from[i * r_.bias_key]);
    return value;
  }

  TILEWISE_INLINE VI seen(int64_t row, int64_t key, VI from_diagonal) const {
    VI seen = from_diagonal >= set1i(int32_t(-left_));
    seen |= iota() + set1i(int32_t(key)) < set1i(r_.global_tokens);
    seen &= from_diagonal <= set1i(int32_t(right_));
    seen &= first_lanes(keys_ - key);
    if (mask_) {
      const uint32_t word = key < keys_ ? mask_[row * r_.mask_row + key / 32] >> key % 32 : 0;
      seen &= ((set1i(int32_t(word)) >> iota()) & 1) != VI{};
    }
    if (blocks_ && key < keys_ && !blocks_[row / r_.block_q * r_.blocks_row + key / r_.block_k]) seen = VI{};
    return seen;
  }
};

}  // namespace
}  // namespace tilewise
