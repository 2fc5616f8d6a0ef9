// Tree attention: every query of a key head attends to the paged prefix, and to the tree's own nodes by their bits.
//
// A task is one key head's queries (up to kTaskRows; row = node * group + head in group) against a range of keys. Keys
// come in blocks; while a block is worked on, the rows of the next one are prefetched. A merge joins the ranges.
#pragma once
#include "common/isa.h"
#include "speculative/cpu/few.h"
#include "speculative/cpu/rows.h"
#include "speculative/cpu/tiles.h"
#include "speculative/params.h"

namespace tilewise {
namespace {

using namespace speculative;

constexpr int kTargetTasks = 32;    // enough for load balance; independent of the number of threads, so results are too
constexpr int kMinTaskKeys = 1024;  // below it the merge would show

// The shape of the work; key ranges are shared out evenly.
struct Plan {
  int group, rows, chunk_rows, chunks, splits;

  Plan(const TreeAttentionParams& p, int64_t longest) {
    group = p.q_heads / p.kv_heads;
    rows = p.nodes * group;
    chunks = int(ceil_div(rows, kTaskRows));
    chunk_rows = int(round_up(ceil_div(rows, chunks), group));
    chunks = int(ceil_div(rows, chunk_rows));
    const int64_t units = int64_t(p.batch) * p.kv_heads * chunks;
    splits = int(max_of<int64_t>(1, min_of(ceil_div(kTargetTasks, units), longest / kMinTaskKeys)));
  }
};

// Nodes with index below this are seen by some node.
inline int nodes_in_use(const TreeAttentionParams& p, int64_t b) {
  uint64_t seen[kMaxNodes / kWordBits] = {};
  const uint64_t* bits = p.ancestor_bits + b * p.nodes * p.words;
  for (int64_t i = 0; i < int64_t(p.nodes) * p.words; i++) seen[i % p.words] |= bits[i];
  for (int w = p.words - 1; w >= 0; w--)
    if (seen[w]) return min_of(p.nodes, (w + 1) * kWordBits - __builtin_clzll(seen[w]));
  return 0;
}

// `attend` works a task of more than kFewRows queries.
template <class T, class Attend>
const char* run_tasks(const TreeAttentionParams& p, const Runtime& rt, const Attend& attend) {
  int* used = scratch<int>(rt, 0, p.batch);
  if (!used) return kOutOfMemory;
  int64_t longest = 0;
  for (int64_t b = 0; b < p.batch; b++) {
    used[b] = nodes_in_use(p, b);
    longest = max_of<int64_t>(longest, p.prefix_len[b] + used[b]);
  }
  const Plan plan(p, longest);
  const int64_t units = int64_t(p.batch) * p.kv_heads * plan.chunks;
  float* partial = nullptr;  // [units, splits, chunk_rows, dim + 2]
  if (plan.splits > 1) {
    partial = scratch<float>(rt, 1, units * plan.splits * plan.chunk_rows * (p.dim + 2));
    if (!partial) return kOutOfMemory;
  }
  bool failed = false;
  parallel_for(rt, units * plan.splits, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at++) {
      const int64_t split = at % plan.splits, unit = at / plan.splits, chunk = unit % plan.chunks;
      const int64_t b = unit / plan.chunks / p.kv_heads, keys = p.prefix_len[b] + used[b];
      const int64_t share = round_up(ceil_div(keys, plan.splits), kKeyBlock);
      Task<T> task(p, b, int(unit / plan.chunks % p.kv_heads), int(chunk * plan.chunk_rows),
                   min_of(plan.chunk_rows, plan.rows - int(chunk * plan.chunk_rows)));
      task.first_key = min_of(keys, split * share);
      task.end_key = min_of(keys, task.first_key + share);
      task.partial = partial ? partial + at * plan.chunk_rows * (p.dim + 2) : nullptr;
      const bool few = task.rows <= kFewRows && p.dim % W == 0;
      if (!(few ? attend_few(task, rt) : attend(task, rt))) failed = true;
    }
  });
  if (failed) return kOutOfMemory;
  if (partial)
    parallel_for(rt, units, 1, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; unit++) {
        const int first = int(unit % plan.chunks * plan.chunk_rows);
        const Task<T> task(p, unit / plan.chunks / p.kv_heads, int(unit / plan.chunks % p.kv_heads), first,
                           min_of(plan.chunk_rows, plan.rows - first));
        merge_splits(task, partial + unit * plan.splits * plan.chunk_rows * (p.dim + 2), plan.splits, plan.chunk_rows);
      }
    });
  return nullptr;
}

template <class Attend>
const char* tree_attention_with(const Attend& attend, const TreeAttentionParams& p, const Runtime& rt) {
  if (p.type == Type::f32) return run_tasks<float>(p, rt, attend);
  return p.type == Type::bf16 ? run_tasks<Bf16>(p, rt, attend) : run_tasks<Fp16>(p, rt, attend);
}

const char* tree_attention(const TreeAttentionParams& p, const Runtime& rt) {
  return tree_attention_with([](const auto& task, const Runtime& rt) { return attend_tiles(task, rt); }, p, rt);
}

}  // namespace
}  // namespace tilewise
