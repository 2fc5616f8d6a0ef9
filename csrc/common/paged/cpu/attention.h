// Attention over a paged cache: every query of a key head attends to the keys that its visibility names.
//
// A task is one key head's queries (up to kTaskRows; row = token * group + head in group) against a range of keys. Keys
// come in blocks; while a block is worked on, the rows of the next one are prefetched. A merge joins the ranges.
#pragma once
#include "common/isa.h"
#include "common/paged/cpu/few.h"
#include "common/paged/cpu/rows.h"
#include "common/paged/cpu/tiles.h"

namespace tilewise::paged {
namespace {

constexpr int kTargetTasks = 32;    // enough for load balance; independent of the number of threads, so results are too
constexpr int kMinTaskKeys = 1024;  // below it the merge would show

// The shape of the work; key ranges are shared out evenly.
struct Plan {
  int group, rows, chunk_rows, chunks, splits;
  int64_t units;

  Plan(const AttentionParams& p, int64_t longest) {
    group = p.q_heads / p.kv_heads;
    rows = p.tokens * group;
    chunks = int(ceil_div(rows, kTaskRows));
    chunk_rows = int(round_up(ceil_div(rows, chunks), group));
    chunks = int(ceil_div(rows, chunk_rows));
    units = int64_t(p.batch) * p.kv_heads * chunks;
    const int64_t wanted = p.splits ? p.splits : min_of(ceil_div(kTargetTasks, units), longest / kMinTaskKeys);
    splits = int(max_of<int64_t>(1, min_of(wanted, ceil_div(longest, kKeyBlock))));
  }
  template <class Visibility>
  Task<Visibility> task(const typename Visibility::Params& p, int64_t unit) const {
    const int first = int(unit % chunks) * chunk_rows;
    const int64_t head = unit / chunks;
    return {p, head / p.kv_heads, int(head % p.kv_heads), first, min_of(chunk_rows, rows - first)};
  }
};

template <class Visibility>
void take_share(Task<Visibility>& task, int64_t split, int splits) {
  KeyRange& keys = task.keys;
  const int64_t share = round_up(ceil_div(keys.end - keys.first, splits), kKeyBlock);
  keys.first = min_of(keys.end, keys.first + split * share);
  keys.end = min_of(keys.end, keys.first + share);
}

// `attend` works a task of more than kFewRows queries.
template <class Source, class Visibility, class Attend>
const char* run_tasks(const typename Visibility::Params& p, const Runtime& rt, const Attend& attend) {
  int64_t longest = 0;
  for (int64_t b = 0; b < p.batch; b++) {
    const KeyRange keys = Visibility(p, b).keys(0, p.tokens);
    longest = max_of(longest, keys.end - keys.first);
  }
  const Plan plan(p, longest);
  float* partial = nullptr;  // [units, splits, chunk_rows, dim + 2]
  if (plan.splits > 1) {
    partial = scratch<float>(rt, 1, plan.units * plan.splits * plan.chunk_rows * (p.dim + 2));
    if (!partial) return kOutOfMemory;
  }
  bool failed = false;
  parallel_for(rt, plan.units * plan.splits, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at++) {
      auto task = plan.template task<Visibility>(p, at / plan.splits);
      take_share(task, at % plan.splits, plan.splits);
      if (partial) task.partial = partial + at * plan.chunk_rows * (p.dim + 2);
      if (task.rows <= kFewRows && Source(p.dim).serves_few())
        attend_few<Source>(task);
      else if (!attend(task, rt))
        failed = true;
    }
  });
  if (failed) return kOutOfMemory;
  if (partial)
    parallel_for(rt, plan.units, 1, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; unit++)
        merge_splits(plan.template task<Visibility>(p, unit),
                     partial + unit * plan.splits * plan.chunk_rows * (p.dim + 2), plan.splits, plan.chunk_rows);
    });
  return nullptr;
}

template <class Source, class Visibility>
const char* attend_pages(const typename Visibility::Params& p, const Runtime& rt) {
  return run_tasks<Source, Visibility>(
      p, rt, [](const Task<Visibility>& task, const Runtime& rt) { return attend_tiles<Source>(task, rt); });
}

template <class F>
auto with_codes(Format format, int dim, const F& f) {
  if (format == Format::int8) return f(CodeRows<8>(dim));
  if (format == Format::int4) return f(CodeRows<4>(dim));
  return format == Format::int2 ? f(CodeRows<2>(dim)) : f(Bfp12Rows(dim));
}

template <class Visibility>
const char* attend_code_pages(const typename Visibility::Params& p, const Runtime& rt) {
  return with_codes(p.format, p.dim, [&](auto source) { return attend_pages<decltype(source), Visibility>(p, rt); });
}

template <class Visibility>
const char* attend_float_pages(const typename Visibility::Params& p, const Runtime& rt) {
  return with_type(p.type, [&](auto type) { return attend_pages<FloatRows<decltype(type)>, Visibility>(p, rt); });
}

}  // namespace
}  // namespace tilewise::paged
