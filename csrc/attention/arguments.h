// The family's argument checks.
#pragma once
#include <algorithm>
#include <climits>
#include <cmath>
#include <optional>
#include <utility>

#include "attention/params.h"
#include "common/check.h"
#include "common/dispatch.h"
#include "tilewise/attention.h"

namespace tilewise::attention {

constexpr int kMaxHeadDim = 256;

// A [b, h, s, d] tensor, or a packed [t, h, d] one seen as [1, h, t, d].
struct View {
  int64_t batch, heads, rows, dim;
  Strides strides;
};
inline View view_of(const Tensor& t) {
  const int64_t *n = t.shape, *s = t.strides;
  if (t.ndim == 4) return {n[0], n[1], n[2], n[3], {s[0], s[1], s[2]}};
  return {1, n[1], n[0], n[2], {0, s[1], s[0]}};
}

inline Type type_of(DType t) {
  return t == DType::f32 ? Type::f32 : t == DType::f16 ? Type::f16 : Type::bf16;
}

// The checks of one call; every tensor it is shown must be on q's device and of q's dtype.
struct Arguments {
  Check check;
  const Tensor& q;

  void like_q(const Tensor& t, const char* name, const char* q_name = "q") const {
    check.same_dtype(t, name, q, q_name);
    check.same_device(t, name, q, q_name);
    check.last_dim_contiguous(t, name);
  }

  void input(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) const {
    check.shape(t, name, shape);
    like_q(t, name);
  }

  void same_shape(const Tensor& t, const char* name, const Tensor& as) const {
    if (as.ndim == 4)
      check.shape(t, name, {as.shape[0], as.shape[1], as.shape[2], as.shape[3]});
    else
      check.shape(t, name, {as.shape[0], as.shape[1], as.shape[2]});
  }

  void statistic(const Tensor& t, const char* name) const {
    check.dtype(t, name, {DType::f32});
    check.same_device(t, name, q, "q");
    if (q.ndim == 4)
      check.shape(t, name, {q.shape[0], q.shape[1], q.shape[2]});
    else
      check.shape(t, name, {q.shape[1], q.shape[0]});
    check.contiguous(t, name);
  }

  void output(const Tensor& t, const char* name, std::initializer_list<const Tensor*> others) const {
    check.output(t, name);
    for (const Tensor* other : others)
      if (other) check.no_overlap(t, name, *other, "another argument");
  }

  // Queries a and keys b of one call.
  void heads_of(const View& a, const View& b) const {
    check.that(b.batch == a.batch, "k", "has batch %ld, expected %ld (q's)", b.batch, a.batch);
    check.that(b.dim == a.dim, "k", "has head dim %ld, expected %ld (q's)", b.dim, a.dim);
    check.that(b.heads > 0 ? a.heads % b.heads == 0 : a.heads == 0, "q",
               "has %ld heads, expected a multiple of %ld (k's)", a.heads, b.heads);
  }

  // q, k and v of one call, packed (3 dimensions) or not (4).
  void inputs(const Tensor& k, const Tensor& v, int dims) const {
    check.dims(q, "q", dims);
    check.dims(k, "k", dims);
    check.dims(v, "v", dims);
    check.dtype(q, "q", {DType::f32, DType::f16, DType::bf16});
    for (const auto& [tensor, name] : {std::pair{&q, "q"}, {&k, "k"}, {&v, "v"}}) like_q(*tensor, name);
    const View a = view_of(q), b = view_of(k), c = view_of(v);
    heads_of(a, b);
    check.that(c.batch == a.batch, "v", "has batch %ld, expected %ld (q's)", c.batch, a.batch);
    check.that(c.heads == b.heads, "v", "has %ld heads, expected %ld (k's)", c.heads, b.heads);
    check.that(c.rows == b.rows, "v", "has %ld keys, expected %ld (k's)", c.rows, b.rows);
    for (const Tensor* t : {&q, &k, &v})
      for (int i = 0; i < dims; i++)
        check.that(t->shape[i] <= INT_MAX, "q, k or v", "has a dimension of %ld, expected at most %d", t->shape[i],
                   INT_MAX);
    head_dim(a.dim, "q");
    head_dim(c.dim, "v");
  }

  void head_dim(int64_t d, const char* name) const {
    if (d < 1 || d > kMaxHeadDim)
      check.fail(ErrorKind::not_implemented, name, "has head dim %ld, expected 1 to %d", d, kMaxHeadDim);
  }
};

// What scores are multiplied by, 1 / sqrt(dim) unless it is given.
inline float checked_scale(const Check& check, const std::optional<double>& given, int64_t dim) {
  return check.number(given.value_or(1 / std::sqrt(static_cast<double>(dim))), "scale");
}

inline float checked_softcap(const Check& check, double given) {
  check.that(given >= 0, "softcap", "is %g, expected at least 0", given);
  return check.number(given, "softcap");
}

// Strides of a tensor that may have 1 in place of any of the sizes [B, Hq, S, Sk]: 0 there.
struct Broadcast {
  int64_t strides[4];
};

inline void check_block_size(const Check& check, int64_t size, const char* name) {
  check.that(size >= 16 && size <= 128 && size % 16 == 0, name,
             "has blocks of %ld, expected a multiple of 16 from 16 to 128", size);
}

// The options' tensors and numbers, checked.
struct RuleArguments {
  const Arguments& a;
  const AttentionOptions& o;
  const ForwardParams& p;
  int64_t rows, keys;  // of the longest sequence, as the caller gave it

  Broadcast broadcast(const Tensor& t, const char* name, const int64_t (&sizes)[4], int dims = 4) const {
    a.check.dims(t, name, dims);
    a.check.same_device(t, name, a.q, "q");
    Broadcast b = {};
    for (int i = 0; i < dims; i++) {
      a.check.that(t.shape[i] == 1 || t.shape[i] == sizes[i], name, "has size %ld in dimension %d, expected 1 or %ld",
                   t.shape[i], i, sizes[i]);
      b.strides[i] = t.shape[i] == 1 ? 0 : t.strides[i];
    }
    return b;
  }

  int window(const std::optional<int64_t>& given, const char* name) const {
    if (!given) return kUnlimited;
    a.check.that(*given >= 0, name, "is %ld, expected at least 0, or none", *given);
    return static_cast<int>(std::min<int64_t>(*given, INT_MAX / 4));
  }

  void numbers(Rules& r) const {
    r.window_left = window(o.window_left, "window (left)");
    r.window_right = window(o.window_right, "window (right)");
    a.check.that(o.global_tokens >= 0, "global_tokens", "is %ld, expected at least 0", o.global_tokens);
    r.global_tokens = static_cast<int>(std::min<int64_t>(o.global_tokens, INT_MAX / 4));
    r.softcap = checked_softcap(a.check, o.softcap);
    a.check.that(o.dropout_p >= 0 && o.dropout_p < 1, "dropout_p", "is %g, expected at least 0 and below 1",
                 o.dropout_p);
    r.dropout_threshold = static_cast<int>(std::lround(65536 * o.dropout_p));
  }

  void bias(Rules& r) const {
    a.check.dtype(*o.bias, "bias", {a.q.dtype, DType::f32});
    const Broadcast b = broadcast(*o.bias, "bias", {p.batch, p.q_heads, rows, keys});
    r.bias = o.bias->data;
    r.bias_batch = b.strides[0], r.bias_head = b.strides[1], r.bias_row = b.strides[2], r.bias_key = b.strides[3];
    r.bias_type = type_of(o.bias->dtype);
  }

  void mask(Rules& r) const {
    a.check.dtype(*o.mask, "mask", {DType::i32});
    const int64_t words = (keys + 31) / 32;
    const Broadcast b = broadcast(*o.mask, "mask", {p.batch, p.q_heads, rows, words});
    a.check.that(o.mask->shape[3] == words, "mask", "has %ld words a row, expected %ld (32 keys each)",
                 o.mask->shape[3], words);
    a.check.last_dim_contiguous(*o.mask, "mask");
    r.mask = o.mask->ptr<uint32_t>();
    r.mask_batch = b.strides[0], r.mask_head = b.strides[1], r.mask_row = b.strides[2];
  }

  void blocks(Rules& r) const {
    check_block_size(a.check, o.block_q, "block_mask (queries)");
    check_block_size(a.check, o.block_k, "block_mask (keys)");
    a.check.dtype(*o.blocks, "block_mask", {DType::boolean});
    const int64_t down = (rows + o.block_q - 1) / o.block_q, across = (keys + o.block_k - 1) / o.block_k;
    const Broadcast b = broadcast(*o.blocks, "block_mask", {p.batch, p.q_heads, down, across});
    for (const auto& [i, size] : {std::pair{2, down}, {3, across}})
      a.check.that(o.blocks->shape[i] == size, "block_mask", "has %ld blocks in dimension %d, expected %ld",
                   o.blocks->shape[i], i, size);
    a.check.last_dim_contiguous(*o.blocks, "block_mask");
    r.blocks = o.blocks->ptr<uint8_t>();
    r.blocks_batch = b.strides[0], r.blocks_head = b.strides[1], r.blocks_row = b.strides[2];
    r.block_q = static_cast<int>(o.block_q), r.block_k = static_cast<int>(o.block_k);
  }

  void vectors(Rules& r) const {
    if (o.sink_logits) {
      a.check.dtype(*o.sink_logits, "sink_logits", {DType::f32});
      a.check.shape(*o.sink_logits, "sink_logits", {p.q_heads});
      a.check.same_device(*o.sink_logits, "sink_logits", a.q, "q");
      a.check.contiguous(*o.sink_logits, "sink_logits");
      r.sink_logits = o.sink_logits->ptr<float>();
    }
    if (o.alibi_slopes) {
      a.check.dtype(*o.alibi_slopes, "alibi_slopes", {DType::f32});
      const Broadcast b = broadcast(*o.alibi_slopes, "alibi_slopes", {p.batch, p.q_heads, 0, 0}, 2);
      a.check.that(o.alibi_slopes->shape[1] == p.q_heads, "alibi_slopes", "has %ld heads, expected %d (q's)",
                   o.alibi_slopes->shape[1], p.q_heads);
      a.check.last_dim_contiguous(*o.alibi_slopes, "alibi_slopes");
      r.alibi_slopes = o.alibi_slopes->ptr<float>();
      r.alibi_batch = b.strides[0];
    }
    if (r.dropout_threshold > 0) {
      a.check.that(o.dropout_seed, "dropout_seed", "is missing, expected one number");
      a.check.dtype(*o.dropout_seed, "dropout_seed", {DType::i64});
      a.check.shape(*o.dropout_seed, "dropout_seed", {1});
      a.check.same_device(*o.dropout_seed, "dropout_seed", a.q, "q");
      r.dropout_seed = o.dropout_seed->ptr<int64_t>();
    }
  }

  Rules rules() const {
    Rules r = {};
    numbers(r);
    if (o.bias) bias(r);
    if (o.mask) mask(r);
    if (o.blocks) blocks(r);
    vectors(r);
    if (p.causal && !causal_or_dense(r)) r.window_right = 0;
    return r;
  }
};

}  // namespace tilewise::attention
