// The rows of one attention task: queries in, keys and values through the block table, results out.
#pragma once
#include "common/isa.h"
#include "speculative/cpu/pages.h"
#include "speculative/params.h"

namespace tilewise {
namespace {

using namespace speculative;

constexpr int kKeyBlock = 120;     // keys per block: a multiple of every register block of tiles.h
constexpr float kLowest = -1e30f;  // below every score; unlike -inf, its difference to itself is a number
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;

inline float exp2_scalar(float x) {
  return exp2(set1(x))[0];
}

// Queries [first_row, first_row + rows) of one key head; row = node * group + head in the group.
template <class T>
struct Task {
  const TreeAttentionParams& p;
  int64_t b;
  int kv_head, first_row, rows, group;
  int64_t prefix, first_key = 0, end_key = 0;
  float* partial = nullptr;  // [rows, dim + 2] for the merge; null: this task writes the result

  Task(const TreeAttentionParams& p, int64_t b, int kv_head, int first_row, int rows)
      : p(p),
        b(b),
        kv_head(kv_head),
        first_row(first_row),
        rows(rows),
        group(p.q_heads / p.kv_heads),
        prefix(p.prefix_len[b]) {}
  int node(int row) const { return (first_row + row) / group; }
  const T* query(int row) const {
    const int64_t head = int64_t(kv_head) * group + (first_row + row) % group;
    return static_cast<const T*>(p.q) + b * p.q_batch + node(row) * p.q_node + head * p.q_head;
  }
  int64_t out_row(int row) const {
    return (b * p.nodes + node(row)) * p.q_heads + int64_t(kv_head) * group + (first_row + row) % group;
  }
  const uint64_t* bits(int row) const { return p.ancestor_bits + (b * p.nodes + node(row)) * p.words; }
  bool padding(int row) const {
    for (int w = 0; w < p.words; w++)
      if (bits(row)[w]) return false;
    return true;
  }
  bool sees(int row, int64_t node) const { return bits(row)[node / kWordBits] >> node % kWordBits & 1; }

  // sums: unnormalised outputs relative to 2^reference; total: the sum of the weights.
  void write(int row, const float* sums, float reference, float total) const {
    if (partial) {
      float* to = partial + int64_t(row) * (p.dim + 2);
      __builtin_memcpy(to, sums, size_t(p.dim) * sizeof(float));
      to[p.dim] = reference;
      to[p.dim + 1] = total;
      return;
    }
    finish(row, sums, reference, total);
  }
  void finish(int row, const float* sums, float reference, float total) const {
    T* out = static_cast<T*>(p.out) + out_row(row) * p.dim;
    const bool none = padding(row) || total == 0;
    const VF inverse = set1(1 / total), zero = set1(0);
    for (int d = 0; d < p.dim; d += W) store(out + d, none ? zero : load(sums + d, p.dim - d) * inverse, p.dim - d);
    p.lse[out_row(row)] = none ? -kInfinity : (reference + __builtin_log2f(total)) * kLn2;
  }
};

// Weights of several key ranges are brought to the largest reference and added.
template <class T>
void merge_splits(const Task<T>& task, float* partial, int splits, int chunk_rows) {
  const int dim = task.p.dim;
  const int64_t stride = int64_t(chunk_rows) * (dim + 2);
  for (int row = 0; row < task.rows; row++) {
    float* first = partial + int64_t(row) * (dim + 2);
    float reference = kLowest, total = 0;
    for (int s = 0; s < splits; s++) reference = max_of(reference, first[s * stride + dim]);
    for (int s = 0; s < splits; s++) {
      const float* from = first + s * stride;
      const float weight = exp2_scalar(from[dim] - reference);
      total += from[dim + 1] * weight;
      for (int d = 0; d < dim; d += W) {
        const VF before = s ? load(first + d, dim - d) : set1(0);
        store(first + d, before + load(from + d, dim - d) * weight, dim - d);
      }
    }
    task.finish(row, first, reference, total);
  }
}

template <class T>
TILEWISE_INLINE void prefetch_row(const T* row, int dim) {
  for (int64_t byte = 0; byte < int64_t(dim * sizeof(T)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(row) + byte, 0, 2);
}

// Addresses of up to kKeyBlock consecutive keys.
template <class T>
struct KeyRows {
  const T *k[kKeyBlock], *v[kKeyBlock];
  int count = 0;
  int64_t first = 0;  // position

  void find(const Task<T>& task, int64_t from, int64_t end) {
    const TreeAttentionParams& p = task.p;
    first = from;
    count = int(min_of<int64_t>(kKeyBlock, end - from));
    if (count <= 0) {
      count = 0;
      return;
    }
    const T* k_head = static_cast<const T*>(p.k_pages) + task.kv_head * p.k_strides.head;
    const T* v_head = static_cast<const T*>(p.v_pages) + task.kv_head * p.v_strides.head;
    PageCursor cursor(p.table, task.b, from);
    for (int j = 0; j < count; j++, cursor.next()) {
      k[j] = k_head + cursor.offset(p.k_strides);
      v[j] = v_head + cursor.offset(p.v_strides);
    }
  }
  void prefetch(int64_t j, int dim) const {
    if (j >= count) return;
    prefetch_row(k[j], dim);
    prefetch_row(v[j], dim);
  }
};

// The end of the block that starts at `from`: a block lies in the prefix or among the nodes, never in both.
template <class T>
int64_t block_end(const Task<T>& task, int64_t from, int most = kKeyBlock) {
  const int64_t end = from < task.prefix ? min_of(task.prefix, task.end_key) : task.end_key;
  return min_of(end, from + most);
}

}  // namespace
}  // namespace tilewise
