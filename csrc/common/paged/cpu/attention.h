// Attention over a paged cache: every query of a key head attends to the keys that its visibility names.
//
// A task is one key head's queries (up to kTaskRows; row = token * group + head in group), or those of a team of key
// heads, against a range of keys. Keys come in blocks; while a block is worked on, the rows of the next one are
// prefetched. A merge joins the ranges.
#pragma once
#include "common/isa.h"
#include "common/paged/cpu/few.h"
#include "common/paged/cpu/rows.h"
#include "common/paged/cpu/tiles.h"

namespace tilewise::paged {
namespace {

constexpr int kTargetTasks = 32;  // enough for load balance; independent of the number of threads, so results are too

// What one task takes at a time.
struct Share {
  int heads = 1, key_step = kKeyBlock;
  int min_keys = 1024;  // below it the merge would show
};

// The shape of the work; key ranges are shared out evenly.
struct Plan {
  Share share;
  int group, rows, chunk_rows, chunks, teams, splits;
  int64_t units;  // (batch, team of key heads, chunk of rows)

  Plan(const AttentionParams& p, int64_t longest, const Share& share) : share(share) {
    group = p.q_heads / p.kv_heads;
    rows = p.tokens * group;
    chunks = int(ceil_div(rows, kTaskRows));
    chunk_rows = int(round_up(ceil_div(rows, chunks), group));
    chunks = int(ceil_div(rows, chunk_rows));
    teams = int(ceil_div(p.kv_heads, share.heads));
    units = int64_t(p.batch) * teams * chunks;
    const int64_t wanted = p.splits ? p.splits : min_of(ceil_div(kTargetTasks, units), longest / share.min_keys);
    splits = int(max_of<int64_t>(1, min_of(wanted, ceil_div(longest, share.key_step))));
  }
  int64_t partial_rows(const AttentionParams& p) const {
    return int64_t(p.batch) * p.kv_heads * chunks * splits * chunk_rows;
  }

  // All keys of a unit; `partial`: [batch, key heads, chunks, splits, chunk_rows, dim + 2], or null.
  template <class Visibility>
  Task<Visibility> task(const typename Visibility::Params& p, int64_t unit, float* partial) const {
    const int chunk = int(unit % chunks), first = chunk * chunk_rows;
    const int64_t team = unit / chunks, b = team / teams;
    const int head = int(team % teams) * share.heads;
    Task<Visibility> task(p, b, head, first, min_of(chunk_rows, rows - first));
    task.heads = min_of(share.heads, p.kv_heads - head);
    if (partial) {
      const int64_t stride = int64_t(splits) * chunk_rows * (p.dim + 2);
      task.partial_stride = stride * chunks;
      task.partial = partial + (b * p.kv_heads + head) * task.partial_stride + chunk * stride;
    }
    return task;
  }
  template <class Visibility>
  void take_split(Task<Visibility>& task, int64_t split) const {
    KeyRange& keys = task.keys;
    const int64_t range = round_up(ceil_div(keys.end - keys.first, splits), share.key_step);
    keys.first = min_of(keys.end, keys.first + split * range);
    task.follow = min_of(keys.end, keys.first + 2 * range);
    keys.end = min_of(keys.end, keys.first + range);
    if (task.partial) task.partial += split * chunk_rows * (task.p.dim + 2);
  }
};

// attend(task, runtime) works a task; false: no memory.
template <class Visibility, class Attend>
const char* run_tasks(const typename Visibility::Params& p, const Runtime& rt, const Share& share,
                      const Attend& attend) {
  int64_t longest = 0;
  for (int64_t b = 0; b < p.batch; b++) {
    const KeyRange keys = Visibility(p, b).keys(0, p.tokens);
    longest = max_of(longest, keys.end - keys.first);
  }
  const Plan plan(p, longest, share);
  float* partial = nullptr;
  if (plan.splits > 1) {
    partial = scratch<float>(rt, 1, plan.partial_rows(p) * (p.dim + 2));
    if (!partial) return kOutOfMemory;
  }
  bool failed = false;
  parallel_for(rt, plan.units * plan.splits, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at++) {
      auto task = plan.template task<Visibility>(p, at / plan.splits, partial);
      plan.take_split(task, at % plan.splits);
      if (at + 1 == end || (at + 1) % plan.splits == 0) task.follow = 0;
      if (!attend(task, rt)) failed = true;
    }
  });
  if (failed) return kOutOfMemory;
  if (partial)
    parallel_for(rt, plan.units, 1, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; unit++) {
        const auto task = plan.template task<Visibility>(p, unit, partial);
        for (int h = 0; h < task.heads; h++) merge_splits(task.of_head(h), plan.splits, plan.chunk_rows);
      }
    });
  return nullptr;
}

// On vectors, by the number of rows.
template <class Source, class Visibility>
bool attend_rows(const Task<Visibility>& task, const Runtime& rt) {
  if (task.rows > kFewRows || !Source(task.p.dim).serves_few()) return attend_tiles<Source>(task, rt);
  attend_few<Source>(task);
  return true;
}

template <class Source, class Visibility>
const char* attend_pages(const typename Visibility::Params& p, const Runtime& rt) {
  return run_tasks<Visibility>(
      p, rt, {}, [](const Task<Visibility>& task, const Runtime& rt) { return attend_rows<Source>(task, rt); });
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
