// Gradients of the bias and of the sinks, in passes of their own after delta is known. With dS the gradient of scores,
// dbias is dS summed over the dimensions in which the bias has size 1: a task owns a block of dbias and recomputes what
// is summed there, so there is one writer, a fixed order and no S x Sk workspace beside dbias itself.
#pragma once
#include "attention/cpu/backward_tile.h"

namespace tilewise {
namespace {

struct Range {
  int64_t begin, end, step;
};

// A block of kLanes rows and ruled_keys() keys of dbias: `at` are its indices, of batch, head, block of rows and keys.
template <class T>
struct BiasGradientTask {
  const BackwardParams& b;
  const ForwardParams& p;
  const BackwardScratch s;
  float* sum;  // [key][lane]
  int block;   // keys
  int64_t at[4];

  bool shared(int dim) const { return b.dbias_sizes[dim] == 1; }

  // What of a dimension of `size` meets in this block, in steps.
  Range range(int dim, int64_t size, int64_t step) const {
    if (shared(dim)) return {0, size, step};
    return {at[dim] * step, min_of((at[dim] + 1) * step, size), step};
  }

  template <class U>
  void operator()(U* dbias) const {
    fill(sum, block * kLanes, 0);
    const Range batches = range(0, p.batch, 1), heads = range(1, p.q_heads, 1);
    for (int64_t batch = batches.begin; batch < batches.end; batch++)
      for (int64_t head = heads.begin; head < heads.end; head++) add_head(sequence_of(p, batch), head);
    write(dbias);
  }

  void add_head(const Sequence& seq, int64_t head) const {
    const HeadRules rules(p, seq, head);
    const Range rows = range(2, seq.queries, kLanes), keys = range(3, seq.keys, block);
    for (int64_t row = rows.begin; row < rows.end; row += kLanes) {
      const int lanes = static_cast<int>(min_of<int64_t>(kLanes, rows.end - row));
      load_tile<T>(b, seq, s.tiles[0], head, row, lanes, 1);
      for (int64_t key = keys.begin; key < keys.end; key += block)
        add_block(rules, seq, head, {row, key, lanes, static_cast<int>(min_of<int64_t>(block, keys.end - key))});
    }
  }

  void add_block(const HeadRules& rules, const Sequence& seq, int64_t head, const Place& place) const {
    const RuledRegions regions(rules, p.rules, place);
    if (regions.size == 0) return;
    const int64_t kv_head = head / (p.q_heads / p.kv_heads), key = seq.k_row + place.key;
    const BackwardTile& tile = s.tiles[0];
    const Rows k =
        as_floats(row_of<const T>(p.k, p.k_strides, seq.batch, kv_head, key), p.k_strides.row, place.keys, p.dim, s.k);
    const Rows v = as_floats(row_of<const T>(p.v, p.v_strides, seq.batch, kv_head, key), p.v_strides.row, place.keys,
                             p.v_dim, s.v);
    for (const Region& r : regions) {
      kProductRegion[r.vectors - 1](r, p.dim, k, tile.q, s.p);
      kProductRegion[r.vectors - 1](r, p.v_dim, v, tile.dout, s.ds);
      adjust_gradients(rules, r, place, {tile.lse, tile.lse_rest, tile.delta}, false, s.p, s.ds);
      for (int key = r.begin; key < r.end; key++)
        for (int i = key * kLanes + r.vector * W; i < key * kLanes + (r.vector + r.vectors) * W; i += W)
          store(sum + i, load(sum + i) + load(s.ds + i));
    }
  }

  // Adds up what is left of shared dimensions, and writes the block.
  template <class U>
  void write(U* dbias) const {
    const Range rows = range(2, b.dbias_sizes[2], kLanes), keys = range(3, b.dbias_sizes[3], block);
    const int row_count = static_cast<int>(rows.end - rows.begin), key_count = static_cast<int>(keys.end - keys.begin);
    if (shared(3)) add_keys_up();
    if (shared(2))
      for (int key = 0; key < key_count; key++) sum[key * kLanes] = lane_sum(sum + key * kLanes);
    float ones[kLanes];
    fill(ones, kLanes, 1);
    const int64_t heads = b.dbias_sizes[1], row_size = b.dbias_sizes[3];
    const int64_t row = (at[0] * heads + at[1]) * b.dbias_sizes[2] + rows.begin;
    unpack_tile(dbias + row * row_size + keys.begin, row_size, sum, row_count, key_count, ones);
  }
  // Into the first, by halves: short chains of roundings.
  void add_keys_up() const {
    for (int count = block; count > 1; count = (count + 1) / 2) {
      const int kept = (count + 1) / 2 * kLanes;
      for (int i = 0; i < count / 2 * kLanes; i += W) store(sum + i, load(sum + i) + load(sum + kept + i));
    }
  }
  static float lane_sum(const float* lanes) {
    VF total = {};
    for (int i = 0; i < kLanes; i += W) total += load(lanes + i);
    return reduce_add(total);
  }
};

template <class T>
const char* bias_gradient(const BackwardParams& b, const Runtime& rt) {
  const ForwardParams& p = b.forward;
  const int block = ruled_keys(p.rules);
  const int64_t *sizes = b.dbias_sizes, down = ceil_div(sizes[2], kLanes), across = ceil_div(sizes[3], block);
  return run_tasks(rt, runs_inline(p), sizes[0] * sizes[1] * down * across, [&](int64_t i) {
    const int64_t floats = backward_scratch_floats(p, 0);
    float* memory = scratch<float>(rt, kTaskScratch, floats + block * kLanes);
    if (!memory) return false;
    const BiasGradientTask<T> task = {
        b,
        p,
        carve(p, 0, memory),
        memory + floats,
        block,
        {i / across / down / sizes[1], i / across / down % sizes[1], i / across % down, i % across}};
    for_type(p.rules.bias_type, [&](auto type) {
      task(static_cast<decltype(type)*>(b.dbias));
      return static_cast<const char*>(nullptr);
    });
    return true;
  });
}

// A sink has the weight exp(sink - lse) and no value: its dS is -weight * delta.
inline float sink_gradient(const BackwardParams& b, int64_t head) {
  const ForwardParams& p = b.forward;
  const float sink = p.rules.sink_logits[head];
  VF sum = {};
  for (int64_t batch = 0; batch < p.batch; batch++) {
    const Sequence seq = sequence_of(p, batch);
    const float* lse = row_of<const float>(p.lse, statistics_strides(p), seq.batch, head, seq.q_row);
    const float* delta = row_of<const float>(b.delta, statistics_strides(p), seq.batch, head, seq.q_row);
    for (int i = 0; i < seq.queries; i += W) {
      const VF at = load(lse + i, seq.queries - i);
      const VF weight = exp2(min(set1(1), (set1(sink) - at) * kFloatLog2e));  // lanes past the end: anything finite
      sum += select(at == set1(-kInfinity), VF{}, weight * load(delta + i, seq.queries - i));
    }
  }
  return -reduce_add(sum);
}

template <class T>
const char* option_gradients(const BackwardParams& b, const Runtime& rt) {
  if (b.dsink)
    for (int64_t head = 0; head < b.forward.q_heads; head++) b.dsink[head] = sink_gradient(b, head);
  return b.dbias ? bias_gradient<T>(b, rt) : nullptr;
}

}  // namespace
}  // namespace tilewise
