// How every backward of the family divides its work. A task owns the gradients of a run of keys of one key/value head,
// so nothing races and every sum has a fixed order. Where there are few heads their keys are split into several runs;
// each then leaves a partial dQ, and these are added in order. The split depends on shapes only: results are the same
// bits on any number of threads.
#pragma once
#include "attention/cpu/problem.h"

namespace tilewise {
namespace {

constexpr int kEnoughTasks = 16;  // split keys only below this

struct Split {
  int64_t runs, keys;  // per head; keys of a run
};
// Runs of whole blocks of keys, of two at least.
inline Split split_keys(const ForwardParams& p, int block) {
  const int64_t heads = int64_t(p.batch) * p.kv_heads;
  const int64_t wanted = min_of(ceil_div(kEnoughTasks, heads), ceil_div(p.seq_k, 2 * block));
  const int64_t keys = max_of<int64_t>(round_up(ceil_div(p.seq_k, max_of<int64_t>(wanted, 1)), block), block);
  return {max_of<int64_t>(ceil_div(p.seq_k, keys), 1), keys};
}

// A task: keys [first_key, first_key + keys) of one head of a sequence.
struct KeyRun {
  Sequence seq;
  int64_t kv_head, index, first_key;
  int keys;
  float* partial;  // [hq, tokens, d] of this run, or null: write dq itself

  // The first run sees every query and so writes all of dq; later ones start where their keys come into sight.
  int64_t first_query(const ForwardParams& p) const {
    return index == 0 ? 0 : max_of<int64_t>(0, first_key - diagonal_of(p, seq));
  }
  float* partial_row(const ForwardParams& p, int64_t head, int64_t row) const {
    const int64_t tokens = p.cu_seqlens_q ? p.total_q : int64_t(p.batch) * p.seq_q;
    return partial + (head * tokens + seq.batch * p.seq_q + seq.q_row + row) * p.dim;
  }
};

// delta[row] = sum of dout * out, less the gradient of lse
template <class T>
void write_delta(const BackwardParams& b, int64_t batch, int64_t head) {
  const ForwardParams& p = b.forward;
  const Sequence seq = sequence_of(p, batch);
  float* delta = row_of<float>(b.delta, statistics_strides(p), seq.batch, head, seq.q_row);
  const float* dlse = b.dlse ? row_of<const float>(b.dlse, statistics_strides(p), seq.batch, head, seq.q_row) : nullptr;
  const T* out = row_of<const T>(p.out, p.out_strides, seq.batch, head, seq.q_row);
  const T* dout = row_of<const T>(b.dout, b.dout_strides, seq.batch, head, seq.q_row);
  for (int i = 0; i < seq.queries; i++) {
    VF sum = {};
    int d = 0;
    for (; d + W <= p.v_dim; d += W) sum += load(out + d) * load(dout + d);
    if (d < p.v_dim) sum += load(out + d, p.v_dim - d) * load(dout + d, p.v_dim - d);
    delta[i] = reduce_add(sum) - (dlse ? dlse[i] : 0);
    out += p.out_strides.row;
    dout += b.dout_strides.row;
  }
}

// dq = the runs' partial results, added in order; a run wrote those rows that see its first key.
template <class T>
void add_partials(const BackwardParams& b, const Split& split, const float* partials, int64_t batch, int64_t head) {
  const ForwardParams& p = b.forward;
  const Sequence seq = sequence_of(p, batch);
  const int64_t tokens = p.cu_seqlens_q ? p.total_q : int64_t(p.batch) * p.seq_q;
  const int64_t diagonal = diagonal_of(p, seq), run_floats = p.q_heads * tokens * p.dim;
  for (int i = 0; i < seq.queries; i++) {
    const float* row = partials + (head * tokens + seq.batch * p.seq_q + seq.q_row + i) * p.dim;
    T* dq = row_of<T>(b.dq, b.dq_strides, seq.batch, head, seq.q_row + i);
    int64_t runs = 1;
    while (runs < split.runs && runs * split.keys < seq.keys && runs * split.keys <= i + diagonal) runs++;
    for (int d = 0; d < p.dim; d += W) {
      VF sum = load(row + d, p.dim - d);
      for (int64_t r = 1; r < runs; r++) sum += load(row + r * run_floats + d, p.dim - d);
      store(dq + d, sum, p.dim - d);
    }
  }
}

// Writes delta, runs task(KeyRun) for all runs, and adds their partial results if there are any: always where keys are
// split, and where tasks ask for them. A task returns false when it runs out of memory.
template <class T, class Task>
const char* run_backward(const BackwardParams& b, const Runtime& rt, const Split& split, bool always_partial,
                         const Task& task) {
  const ForwardParams& p = b.forward;
  const bool inlined = runs_inline(p);
  const int64_t q_heads = int64_t(p.batch) * p.q_heads, kv_heads = int64_t(p.batch) * p.kv_heads;
  const char* failure = run_tasks(rt, inlined, q_heads, [&](int64_t i) {
    write_delta<T>(b, i / p.q_heads, i % p.q_heads);
    return true;
  });
  if (failure) return failure;

  float* partials = nullptr;
  const int64_t run_floats = (p.cu_seqlens_q ? p.total_q : int64_t(p.batch) * p.seq_q) * p.q_heads * p.dim;
  if (split.runs > 1 || always_partial) {
    partials = scratch<float>(rt, kCallScratch, split.runs * run_floats);
    if (!partials) return kOutOfMemory;
  }
  failure = run_tasks(rt, inlined, kv_heads * split.runs, [&](int64_t i) {
    const int64_t run = i / kv_heads, first_key = run * split.keys;
    const Sequence seq = sequence_of(p, i % kv_heads / p.kv_heads);
    const int keys = static_cast<int>(max_of<int64_t>(0, min_of<int64_t>(split.keys, seq.keys - first_key)));
    if (keys == 0 && run > 0) return true;
    return task(KeyRun{seq, i % p.kv_heads, run, first_key, keys, partials ? partials + run * run_floats : nullptr});
  });
  if (failure || !partials) return failure;
  return run_tasks(rt, inlined, q_heads, [&](int64_t i) {
    add_partials<T>(b, split, partials, i / p.q_heads, i % p.q_heads);
    return true;
  });
}

}  // namespace
}  // namespace tilewise
