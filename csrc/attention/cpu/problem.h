// Where the rows of one sequence lie, packed or not; and how work is handed to threads.
#pragma once
#include "attention/params.h"
#include "common/isa.h"

namespace tilewise {
namespace {

using namespace attention;

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr int64_t kNoDiagonal = int64_t(1) << 40;  // of attention that is not causal

struct Sequence {
  int64_t batch;         // index along the batch dimension; 0 for packed tensors
  int64_t q_row, k_row;  // first row
  int queries, keys;
  int64_t number;  // among all sequences, packed or not
};

inline Sequence sequence_of(const ForwardParams& p, int64_t b) {
  if (!p.cu_seqlens_q) return {b, 0, 0, p.seq_q, p.seq_k, b};
  const int32_t *q = p.cu_seqlens_q + b, *k = p.cu_seqlens_k + b;
  return {0, q[0], k[0], q[1] - q[0], k[1] - k[0], b};
}

// lse and delta: [b, hq, s] | [hq, tq]
inline Strides statistics_strides(const ForwardParams& p) {
  if (p.cu_seqlens_q) return {0, p.total_q, 1};
  return {int64_t(p.q_heads) * p.seq_q, p.seq_q, 1};
}

template <class T, class P>
inline T* row_of(P* base, const Strides& strides, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(base) + batch * strides.batch + head * strides.head + row * strides.row;
}

// Key j is visible to query i iff j <= i + diagonal.
inline int64_t diagonal_of(const ForwardParams& p, const Sequence& s) {
  return p.causal ? int64_t(s.keys) - s.queries : kNoDiagonal;
}

constexpr int kCallScratch = 0, kTaskScratch = 1;

// Below this many operations, waking the thread team costs more than it saves.
constexpr double kInlineFlops = 2e6;
inline bool runs_inline(const ForwardParams& p) {
  return double(p.batch) * p.q_heads * p.seq_q * p.seq_k * (p.dim + p.v_dim) < kInlineFlops;
}

// Threads take tasks one at a time, in order: causal tasks differ in length. `body(i)` returns false when it runs out
// of memory.
template <class F>
const char* run_tasks(const Runtime& rt, bool inlined, int64_t tasks, const F& body) {
  int64_t next = 0;
  int failed = 0;
  const int64_t workers = inlined ? 1 : min_of<int64_t>(rt.num_threads(), tasks);
  parallel_for(rt, workers, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks;)
      if (!body(i)) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
  });
  return failed ? kOutOfMemory : nullptr;
}

// f(T()) for the element type of a call.
template <class F>
const char* for_type(Type type, const F& f) {
  switch (type) {
    case Type::f32: return f(float());
    case Type::f16: return f(Fp16());
    default: return f(Bf16());
  }
}

}  // namespace
}  // namespace tilewise
