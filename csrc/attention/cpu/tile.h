// Tiles of queries: kLanes queries side by side as vector lanes, [row][kLanes]; and blocks of keys.
#pragma once
#include "attention/cpu/micro.h"
#include "common/transpose.h"

namespace tilewise {
namespace {

constexpr int kKeys = 126;  // keys of a block: a multiple of kRows whose probabilities stay in the L1 cache

// Hands out pieces of one scratch buffer.
struct Carver {
  float* next;
  float* take(int64_t count) {
    float* piece = next;
    next += round_up(count, 16);
    return piece;
  }
};

TILEWISE_INLINE void fill(float* p, int64_t count, float value) {
  for (int64_t i = 0; i < count; i++) p[i] = value;
}

// tile[d][lane] = row(lane)[d] * scale; lanes from `count` on are zero, up to a whole vector.
template <class Row>
void pack_tile(float* tile, const Row& row, int count, int dim, float scale) {
  for (int lane = 0; lane < count; lane += W) {
    for (int d = 0; d < dim; d += W) {
      VF block[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++)
        block[i] = lane + i >= count ? VF{} : d + W <= dim ? load(row(lane + i) + d) : load(row(lane + i) + d, dim - d);
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < W; i++)
        if (d + i < dim) store(tile + (d + i) * kLanes + lane, block[i] * scale);
    }
  }
}

template <class T>
void pack_tile(float* tile, const T* rows, int64_t stride, int count, int dim, float scale) {
  pack_tile(tile, [=](int i) { return rows + i * stride; }, count, dim, scale);
}

// row(lane)[d] = tile[d][lane] * factors[lane]
template <class Row>
void unpack_tile(const Row& row, const float* tile, int count, int dim, const float* factors) {
  for (int lane = 0; lane < count; lane += W) {
    const VF factor = load(factors + lane);
    for (int d = 0; d < dim; d += W) {
      VF block[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) block[i] = d + i < dim ? load(tile + (d + i) * kLanes + lane) * factor : VF{};
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) {
        if (lane + i >= count) continue;
        auto* to = row(lane + i) + d;
        d + W <= dim ? store(to, block[i]) : store(to, block[i], dim - d);
      }
    }
  }
}
template <class T>
void unpack_tile(T* rows, int64_t stride, const float* tile, int count, int dim, const float* factors) {
  unpack_tile([=](int i) { return rows + i * stride; }, tile, count, dim, factors);
}

// to[i][d] = from[i][d] as floats; rows are padded with zeros to whole vectors (`padded` floats each).
template <class T>
void widen_rows(float* to, int padded, const T* from, int64_t stride, int count, int dim) {
  for (int i = 0; i < count; i++) {
    int d = 0;
    for (; d + W <= dim; d += W) store(to + i * padded + d, load(from + i * stride + d));
    if (d < dim) store(to + i * padded + d, load(from + i * stride + d, dim - d));
  }
}

template <class T>
void narrow_rows(T* to, int64_t stride, const float* from, int padded, int count, int dim) {
  for (int i = 0; i < count; i++) {
    int d = 0;
    for (; d + W <= dim; d += W) store(to + i * stride + d, load(from + i * padded + d));
    if (d < dim) store(to + i * stride + d, load(from + i * padded + d), dim - d);
  }
}

// Rows as floats: where they lie when they are floats already, else widened into `space`.
struct Rows {
  const float* data;
  int64_t stride;
};
TILEWISE_INLINE Rows as_floats(const float* rows, int64_t stride, int, int, float*) {
  return {rows, stride};
}
template <class T>
TILEWISE_INLINE Rows as_floats(const T* rows, int64_t stride, int count, int dim, float* space) {
  const int padded = static_cast<int>(round_up(dim, W));
  widen_rows(space, padded, rows, stride, count, dim);
  return {space, padded};
}

// A part of a block of keys against the vectors of a tile that can see it: keys [begin, end), `vectors` vectors from
// `vector` on.
struct Region {
  int begin, end, vector, vectors;
  bool masked;  // lane i of the first of these vectors sees key j iff i >= j * step - diagonal; the others see all
  int diagonal, step;
};

// Splits a block of `count` keys, of which lane i sees key j iff j <= first + i / step: one region that all lanes see,
// and per vector the keys around its diagonal. Causal attention pays for whole vectors only where they see something.
struct Regions {
  Region list[kVectors + 1];
  int size = 0;

  void add(int begin, int64_t end, int vector, int vectors, bool masked, int64_t diagonal, int step) {
    if (begin < end)
      list[size++] = {begin, static_cast<int>(end), vector, vectors, masked, static_cast<int>(diagonal), step};
  }
  Regions(int count, int64_t first, int vectors, int step = 1) {
    const int seen_by_all = static_cast<int>(max_of<int64_t>(0, min_of<int64_t>(first, count)));
    add(0, seen_by_all, 0, vectors, false, 0, 1);
    for (int v = 0; v < vectors && seen_by_all < count; v++) {
      const int begin = static_cast<int>(max_of<int64_t>(first + ceil_div(v * W, step), 0));
      if (begin >= count) break;
      const int64_t end = first + ceil_div((v + 1) * W, step);
      add(begin, min_of<int64_t>(end, count), v, vectors - v, true, first * step + v * W, step);
    }
  }
  const Region* begin() const { return list; }
  const Region* end() const { return list + size; }
};

}  // namespace
}  // namespace tilewise
