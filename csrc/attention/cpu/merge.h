// Joining partial results, and rotary embeddings: one pass over the rows, at memory speed.
#pragma once
#include "attention/cpu/problem.h"

namespace tilewise {
namespace {

// Calls body(batch, head, row, index) for every row of [b, h, s] on the threads.
template <class Body>
void for_all_rows(const Runtime& rt, int64_t batch, int64_t heads, int64_t rows, const Body& body) {
  parallel_for(rt, batch * heads * rows, 256, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at++) body(at / rows / heads, at / rows % heads, at % rows, at);
  });
}

// The weight of each part in a row, and the row's lse.
struct MergeWeights {
  float weights[kMaxParts], lse;

  MergeWeights(const MergeParams& p, int64_t at) {
    float largest = -kInfinity, sum = 0;
    for (int i = 0; i < p.parts; i++) largest = max_of(largest, p.lses[i][at]);
    const bool blind = largest == -kInfinity;  // no part saw a key
    for (int i = 0; i < p.parts; i++) {
      weights[i] = blind ? 0 : exp2(set1((p.lses[i][at] - largest) * 1.44269504f))[0];
      sum += weights[i];
    }
    for (int i = 0; i < p.parts; i++) weights[i] = blind ? 0 : weights[i] / sum;
    lse = blind ? -kInfinity : static_cast<float>(largest + __builtin_log2(sum) * 0.6931471805599453);
  }
};

template <class T>
const T* part_row(const MergeParams& p, int part, int64_t b, int64_t h, int64_t row) {
  return row_of<const T>(p.outs[part], p.outs_strides[part], b, h, row);
}

template <class T>
const char* merge_typed(const MergeParams& p, const Runtime& rt) {
  for_all_rows(rt, p.batch, p.heads, p.rows, [&](int64_t b, int64_t h, int64_t row, int64_t at) {
    const MergeWeights w(p, at);
    T* out = row_of<T>(p.out, p.out_strides, b, h, row);
    const T* parts[kMaxParts];
    for (int i = 0; i < p.parts; i++) parts[i] = part_row<T>(p, i, b, h, row);
    for (int d = 0; d < p.dim; d += W) {
      VF sum = {};
      for (int i = 0; i < p.parts; i++)
        if (w.weights[i] != 0) sum += load(parts[i] + d, p.dim - d) * w.weights[i];
      store(out + d, sum, p.dim - d);
    }
    p.lse[at] = w.lse;
  });
  return nullptr;
}

template <class T>
const char* merge_backward_typed(const MergeBackwardParams& b, const Runtime& rt) {
  const MergeParams& p = b.forward;
  for_all_rows(rt, p.batch, p.heads, p.rows, [&](int64_t batch, int64_t h, int64_t row, int64_t at) {
    const MergeWeights w(p, at);
    const T* dout = row_of<const T>(b.dout, b.dout_strides, batch, h, row);
    VF dots[kMaxParts] = {};
    const T* parts[kMaxParts];
    T* to[kMaxParts];
    for (int i = 0; i < p.parts; i++) {
      parts[i] = part_row<T>(p, i, batch, h, row);
      to[i] = row_of<T>(b.douts[i], b.douts_strides[i], batch, h, row);
    }
    for (int d = 0; d < p.dim; d += W) {
      const VF g = load(dout + d, p.dim - d);
      for (int i = 0; i < p.parts; i++) {
        if (w.weights[i] != 0) dots[i] += g * load(parts[i] + d, p.dim - d);
        store(to[i] + d, g * w.weights[i], p.dim - d);
      }
    }
    float dot[kMaxParts], joined = 0;  // joined: dout . out
    for (int i = 0; i < p.parts; i++) joined += w.weights[i] * (dot[i] = reduce_add(dots[i]));
    for (int i = 0; i < p.parts; i++)
      b.dlses[i][at] = w.weights[i] == 0 ? 0 : w.weights[i] * (dot[i] - joined + b.dlse[at]);
  });
  return nullptr;
}

const char* merge(const MergeParams& p, const Runtime& rt) {
  return for_type(p.type, [&](auto type) { return merge_typed<decltype(type)>(p, rt); });
}
const char* merge_backward(const MergeBackwardParams& b, const Runtime& rt) {
  return for_type(b.forward.type, [&](auto type) { return merge_backward_typed<decltype(type)>(b, rt); });
}

// One row; `cos` and `sin` have `pairs` numbers, sin negated for the inverse.
template <class T>
TILEWISE_INLINE void rotate_halves(const T* x, T* out, const float* cos, const float* sin, float sign, int pairs) {
  for (int i = 0; i < pairs; i += W) {
    const int n = pairs - i;
    const VF x0 = load(x + i, n), x1 = load(x + pairs + i, n), c = load(cos + i, n), s = load(sin + i, n) * sign;
    store(out + i, x0 * c - x1 * s, n);
    store(out + pairs + i, x1 * c + x0 * s, n);
  }
}
template <class T>
TILEWISE_INLINE void rotate_neighbours(const T* x, T* out, const float* cos, const float* sin, float sign, int pairs) {
  for (int i = 0; i < pairs; i++) {
    const float x0 = to_float(x[2 * i]), x1 = to_float(x[2 * i + 1]), s = sin[i] * sign;
    out[2 * i] = from_float<T>(x0 * cos[i] - x1 * s);
    out[2 * i + 1] = from_float<T>(x1 * cos[i] + x0 * s);
  }
}

template <class T>
const char* rope_typed(const RopeParams& p, const Runtime& rt) {
  const float sign = p.inverse ? -1 : 1;
  for_all_rows(rt, p.batch, p.heads, p.rows, [&](int64_t b, int64_t h, int64_t row, int64_t) {
    const T* x = row_of<const T>(p.x, p.x_strides, b, h, row);
    T* out = row_of<T>(p.out, p.out_strides, b, h, row);
    const int64_t at = b * p.table_batch + row * p.table_row;
    (p.interleaved ? rotate_neighbours<T> : rotate_halves<T>)(x, out, p.cos + at, p.sin + at, sign, p.pairs);
    if (out != x)
      for (int d = 2 * p.pairs; d < p.dim; d++) out[d] = x[d];
  });
  return nullptr;
}

const char* rope(const RopeParams& p, const Runtime& rt) {
  return for_type(p.type, [&](auto type) { return rope_typed<decltype(type)>(p, rt); });
}

}  // namespace
}  // namespace tilewise
