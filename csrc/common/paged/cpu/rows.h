// The rows of one attention task: queries in, keys and values through the block table, results out.
//
// What a query sees is a policy, made for a sequence of the batch from the kernel's parameters:
//   Visibility::Params                 derived from AttentionParams
//   keys(token, tokens) -> KeyRange    what some of these tokens see, and what all of them see
//   blind(token)                       the token sees nothing, also no key that all of its neighbours see
//   seen(token, key) -> KeyBits        which of the keys from `key` on the token sees
#pragma once
#include "common/isa.h"
#include "common/paged/cpu/cursor.h"
#include "common/paged/params.h"

namespace tilewise::paged {
namespace {

constexpr int kKeyBlock = 120;     // keys per block: a multiple of every register block of tiles.h
constexpr float kLowest = -1e30f;  // below every score; unlike -inf, its difference to itself is a number
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;

inline float exp2_scalar(float x) {
  return exp2(set1(x))[0];
}

// Keys outside [first, end) are seen by nobody, those in [full_first, full_end) by all.
struct KeyRange {
  int64_t first, end, full_first, full_end;

  bool full(int64_t key) const { return key >= full_first && key < full_end; }
  // The end of the block that starts at `from`: its keys are seen by all, or all of them need a mask.
  int64_t block_end(int64_t from, int most = kKeyBlock) const {
    int64_t stop = end;
    if (from < full_end) stop = min_of(stop, from < full_first ? full_first : full_end);
    return min_of(stop, from + most);
  }
};

// One bit for each key of a block.
struct KeyBits {
  uint64_t words[2];

  bool operator[](int i) const { return words[i / 64] >> i % 64 & 1; }
  // f(i) for the keys that are seen, of the first `count`.
  template <class F>
  void each(int count, const F& f) const {
    for (int w = 0; w < 2; w++)
      for (uint64_t left = words[w]; left; left &= left - 1) {
        const int i = w * 64 + __builtin_ctzll(left);
        if (i >= count) return;
        f(i);
      }
  }
};
static_assert(kKeyBlock <= 128);

template <class F>
auto with_type(Type type, const F& f) {
  if (type == Type::f32) return f(float{});
  return type == Type::bf16 ? f(Bf16{}) : f(Fp16{});
}

// Queries [first_row, first_row + rows) of a key head; row = token * group + head in the group. A task may go on for
// the next `heads` - 1 key heads, each with rows of its own.
template <class Visibility>
struct Task {
  const typename Visibility::Params& p;
  Visibility visible;
  int64_t b;
  int kv_head, first_row, rows, group;
  KeyRange keys;
  int heads = 1;
  int64_t follow = 0;          // past keys.end: this thread goes on with the keys up to here
  float* partial = nullptr;    // [rows, dim + 2] for the merge; null: this task writes the result
  int64_t partial_stride = 0;  // to the next head's

  Task(const typename Visibility::Params& p, int64_t b, int kv_head, int first_row, int rows)
      : p(p),
        visible(p, b),
        b(b),
        kv_head(kv_head),
        first_row(first_row),
        rows(rows),
        group(p.q_heads / p.kv_heads),
        keys(visible.keys(token(0), token(rows - 1) - token(0) + 1)) {}
  // The same of one key head, `h` further.
  Task of_head(int h) const {
    Task task = *this;
    task.kv_head += h;
    task.heads = 1;
    if (partial) task.partial += h * partial_stride;
    return task;
  }
  int token(int row) const { return (first_row + row) / group; }
  int head(int row) const { return kv_head * group + (first_row + row) % group; }
  int64_t offset(int row, const TokenStrides& s) const {
    return b * s.batch + token(row) * s.token + head(row) * s.head;
  }
  template <class T>
  const T* query(int row) const {
    return static_cast<const T*>(p.q) + offset(row, p.q_strides);
  }
  // The query times `factor`, with zeros up to `width`.
  void load_query(int row, float* to, int width, float factor) const {
    with_type(p.type, [&](auto type) {
      const auto* from = query<decltype(type)>(row);
      for (int d = 0; d < p.dim; d += W) store(to + d, load(from + d, p.dim - d) * factor, width - d);
    });
    for (int d = p.dim; d < width; d++) to[d] = 0;
    if (p.k_channels) multiply(to, p.k_channels);
  }
  // The query, ready for scores in powers of two.
  void load_query(int row, float* to, int width) const { load_query(row, to, width, p.scale * kLog2e); }
  // By the numbers of the channels of this key head.
  void multiply(float* row, const float* channels) const {
    channels += int64_t(kv_head) * p.dim;
    for (int d = 0; d < p.dim; d += W)
      store(row + d, load(row + d, p.dim - d) * load(channels + d, p.dim - d), p.dim - d);
  }

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
    float scaled[kMaxHeadDim];
    if (p.v_channels) {
      __builtin_memcpy(scaled, sums, size_t(p.dim) * sizeof(float));
      multiply(scaled, p.v_channels);
      sums = scaled;
    }
    const bool none = visible.blind(token(row)) || total == 0;
    const VF inverse = set1(1 / total), zero = set1(0);
    with_type(p.type, [&](auto type) {
      auto* out = static_cast<decltype(type)*>(p.out) + offset(row, p.out_strides);
      for (int d = 0; d < p.dim; d += W) store(out + d, none ? zero : load(sums + d, p.dim - d) * inverse, p.dim - d);
    });
    p.lse[offset(row, p.lse_strides)] = none ? -kInfinity : (reference + __builtin_log2f(total)) * kLn2;
  }
};

// Weights of several key ranges are brought to the largest reference and added.
template <class Visibility>
void merge_splits(const Task<Visibility>& task, int splits, int chunk_rows) {
  const int dim = task.p.dim;
  const int64_t stride = int64_t(chunk_rows) * (dim + 2);
  for (int row = 0; row < task.rows; row++) {
    float* first = task.partial + int64_t(row) * (dim + 2);
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

// Addresses of up to kKeyBlock consecutive keys.
struct KeyRows {
  const char *k[kKeyBlock], *v[kKeyBlock];
  int count = 0, row_bytes = 0;
  int64_t first = 0;  // position

  template <class Visibility, class Source>
  void find(const Task<Visibility>& task, int64_t from, int64_t end, const Source& source) {
    constexpr int item = Source::kItem;
    const AttentionParams& p = task.p;
    row_bytes = source.bytes();
    first = from;
    count = int(min_of<int64_t>(kKeyBlock, end - from));
    if (count <= 0) {
      count = 0;
      return;
    }
    const char* k_head = static_cast<const char*>(p.k_pages) + task.kv_head * p.k_strides.head * item;
    const char* v_head = static_cast<const char*>(p.v_pages) + task.kv_head * p.v_strides.head * item;
    PageCursor cursor(p.table, task.b, from);
    for (int j = 0; j < count; j++, cursor.next()) {
      k[j] = k_head + cursor.offset(p.k_strides) * item;
      v[j] = v_head + cursor.offset(p.v_strides) * item;
    }
  }
  // Whether `n` keys from key i on stand in one page, and so equally far apart.
  bool in_one_page(int i, int n, int page_size) const {
    return i + n <= count && (first + i) % page_size + n <= page_size;
  }
  static TILEWISE_INLINE void prefetch_row(const char* row, int bytes) {
    for (int byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte, 0, 2);
  }
  void prefetch_key(int64_t j) const {
    if (j < count) prefetch_row(k[j], row_bytes);
  }
  void prefetch_value(int64_t j) const {
    if (j < count) prefetch_row(v[j], row_bytes);
  }
  void prefetch(int64_t j) const {
    prefetch_key(j);
    prefetch_value(j);
  }
};

// x = softcap * tanh(x / softcap) for scores in powers of two.
struct Softcap {
  float limit;  // in powers of two; 0: no limit

  explicit Softcap(const AttentionParams& p) : limit(p.softcap * kLog2e) {}
  explicit operator bool() const { return limit != 0; }
  // tanh(y) = 1 - 2 / (1 + exp(2 y)), by a polynomial where that cancels.
  TILEWISE_INLINE VF operator()(VF x) const {
    const VF y = x * (1 / limit), y2 = y * y;
    const VF bounded = min(max(y, set1(-20)), set1(20));
    const VF far = 1 - 2 / (1 + exp2(bounded * (2 * kLog2e)));
    VF near = set1(-5.70498872745e-3f);
    near = near * y2 + 2.06390887954e-2f;
    near = near * y2 - 5.37397155531e-2f;
    near = near * y2 + 1.33314422036e-1f;
    near = near * y2 - 3.33332819422e-1f;
    near = y + y * y2 * near;
    const VF tanh = select(abs(y) < set1(0.625f), near, far);
    return select(y == y, tanh * limit, y);
  }
  TILEWISE_INLINE void apply(float* scores, int count) const {
    for (int j = 0; j < count; j += W) store(scores + j, (*this)(load(scores + j)));
  }
};

}  // namespace
}  // namespace tilewise::paged
