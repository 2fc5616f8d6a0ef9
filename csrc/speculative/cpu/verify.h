// Greedy verification: down the tree along the target's choices, reading only the logits of the nodes on the way.
#pragma once
#include "common/isa.h"
#include "speculative/params.h"

namespace tilewise {
namespace {

using namespace speculative;

constexpr int kVocabGrain = 32768;  // one thread's share of a row: below it, a second thread costs more than it saves

struct Choice {
  float value;
  int32_t index;
};

// torch.argmax's rule: NaN is above every number, and of equals the first wins.
inline bool beats(Choice a, Choice b) {
  const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
  if (a_nan != b_nan) return a_nan;
  if (a.value == b.value || a_nan) return a.index < b.index;
  return a.value > b.value;
}

template <class T>
Choice argmax(const T* x, int begin, int end) {
  VF best = set1(-kInfinity);
  VI index = set1i(begin) + iota(), where = index;
  int i = begin;
  for (; i + W <= end; i += W, where += W) {
    const VF v = load(x + i);
    const VI better = ((v > best) | (v != v)) & (best == best);
    best = select(better, v, best);
    index = select(better, where, index);
  }
  // A lane that never improved holds -inf and its own first position, which stands for the row's -inf elements.
  Choice choice = {best[0], index[0]};
  for (int lane = 1; lane < W && begin + lane < end; lane++) {
    const Choice other = {best[lane], index[lane]};
    if (beats(other, choice)) choice = other;
  }
  for (; i < end; i++) {
    const Choice other = {to_float(x[i]), i};
    if (beats(other, choice)) choice = other;
  }
  return choice;
}

inline Choice argmax_of(const VerifyGreedyParams& p, int64_t b, int node, int begin, int end) {
  const int64_t at = b * p.logits_batch + node * p.logits_node;
  if (p.type == Type::f32) return argmax(static_cast<const float*>(p.logits) + at, begin, end);
  if (p.type == Type::bf16) return argmax(static_cast<const Bf16*>(p.logits) + at, begin, end);
  return argmax(static_cast<const Fp16*>(p.logits) + at, begin, end);
}

// The walk through one tree: at `node`, `depth` drafts accepted.
struct Walk {
  int32_t node, depth;
  bool done;
};

inline void start_walk(const VerifyGreedyParams& p, int64_t b, Walk& walk) {
  walk = {0, 0, false};
  int32_t* path = p.path + b * (p.max_depth + 1);
  int32_t* out = p.out_tokens + b * (p.max_depth + 1);
  for (int i = 0; i <= p.max_depth; i++) path[i] = out[i] = -1;
  path[0] = 0;
}

inline int child_with_token(const VerifyGreedyParams& p, int64_t b, int node, int32_t token) {
  const int32_t *parent = p.parent + b * p.nodes, *tokens = p.tokens + b * p.nodes;
  for (int i = node + 1; i < p.n_nodes[b]; i++)
    if (parent[i] == node && tokens[i] == token) return i;
  return -1;
}

inline void step_walk(const VerifyGreedyParams& p, int64_t b, Walk& walk, int32_t choice) {
  p.out_tokens[b * (p.max_depth + 1) + walk.depth] = choice;
  const int child = walk.depth < p.max_depth ? child_with_token(p, b, walk.node, choice) : -1;
  p.accept_len[b] = walk.depth;
  walk.done = child < 0;
  if (walk.done) return;
  walk.node = child;
  p.path[b * (p.max_depth + 1) + ++walk.depth] = child;
}

// All trees take a step together, so that a single tree's row of logits can be shared out between the threads.
const char* verify_greedy(const VerifyGreedyParams& p, const Runtime& rt) {
  const int parts = p.logits ? int(max_of<int64_t>(1, p.vocab / kVocabGrain)) : 1;
  Walk* walks = scratch<Walk>(rt, 0, p.batch);
  Choice* choices = scratch<Choice>(rt, 1, int64_t(p.batch) * parts);
  if (!walks || !choices) return kOutOfMemory;
  for (int64_t b = 0; b < p.batch; b++) start_walk(p, b, walks[b]);
  for (bool active = true; active;) {
    parallel_for(
        rt, int64_t(p.batch) * parts, max_of(1, kVocabGrain / (p.vocab / parts + 1)), [&](int64_t begin, int64_t end) {
          for (int64_t at = begin; at < end; at++) {
            const int64_t b = at / parts, part = at % parts;
            if (walks[b].done) continue;
            const int64_t width = ceil_div(p.vocab, parts), first = part * width;
            choices[at] = p.logits
                              ? argmax_of(p, b, walks[b].node, int(first), int(min_of<int64_t>(first + width, p.vocab)))
                              : Choice{0, p.argmax[b * p.nodes + walks[b].node]};
          }
        });
    active = false;
    for (int64_t b = 0; b < p.batch; b++) {
      if (walks[b].done) continue;
      Choice best = choices[b * parts];
      for (int part = 1; part < parts; part++)
        if (beats(choices[b * parts + part], best)) best = choices[b * parts + part];
      step_walk(p, b, walks[b], best.index);
      active |= !walks[b].done;
    }
  }
  return nullptr;
}

}  // namespace
}  // namespace tilewise
