// Greedy verification: one block walks one tree, reading only the logits of the nodes on the way.
#pragma once
#include "speculative/cuda/faults.h"

namespace tilewise::speculative {

// Orders (value, index) as torch.argmax does: larger values first, NaN above all, of equals the first index.
SIMT_DEVICE uint64_t choice_key(float value, int index) {
  const uint32_t bits = f32_bits(value == 0.f ? 0.f : value);  // -0 equals 0
  const uint32_t rising = value != value ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (uint64_t)rising << 32 | (0xffffffffu - (uint32_t)index);
}

template <class T>
SIMT_DEVICE float logit(T v) {
  return to_f32(v);
}
template <>
SIMT_DEVICE float logit<float>(float v) {
  return v;
}

template <class T>
struct VerifyGreedy {
  static constexpr int kThreads = 512, kMinArch = 800, kWarps = kThreads / kWarp, kVector = 16 / (int)sizeof(T);
  struct Params {
    VerifyGreedyParams p;
    uint32_t* fault;
  };
  struct Smem {
    int parent[kMaxNodes], token[kMaxNodes];
    uint64_t best[kWarps];
    int child[kWarps];
  };

  // The best of this thread's elements. Later elements win only if larger, so the first of equals stays.
  struct Best {
    float value;
    int index;
    SIMT_DEVICE void take(float v, int i) {
      if (!(v <= value) && value == value) {
        value = v;
        index = i;
      }
    }
  };

  SIMT_DEVICE static void take_word(Best& best, uint32_t word, int index) {
    if constexpr (is_same_v<T, float>) {
      best.take(bits_f32(word), index);
    } else {
      const float2 pair = unpack2<T>(word);
      best.take(pair.x, index);
      best.take(pair.y, index + 1);
    }
  }

  SIMT_DEVICE static int argmax(const T* row, int vocab, Smem& s) {
    const int t = thread_id();
    Best best = {-INFINITY, t < vocab ? t : vocab - 1};
    const bool aligned = reinterpret_cast<uintptr_t>(row) % 16 == 0;
    const int vectors = aligned ? vocab / kVector : 0;
    if (vectors) best.index = (t < vectors ? t : vectors - 1) * kVector;
#pragma unroll 4
    for (int i = t; i < vectors; i += kThreads) {
      const uint4 raw = load16_stream(row + (int64_t)i * kVector);
      const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int w = 0; w < 4; w++) take_word(best, words[w], i * kVector + w * (kVector / 4));
    }
    for (int i = vectors * kVector + t; i < vocab; i += kThreads) best.take(logit(row[i]), i);
    uint64_t key = warp_max(choice_key(best.value, best.index));
    if (lane_id() == 0) s.best[warp_id()] = key;
    sync_block();
    for (int w = 0; w < kWarps; w++) key = s.best[w] > key ? s.best[w] : key;
    return (int)(0xffffffffu - (uint32_t)key);
  }

  // The smallest child of `node` that holds `token`; kMaxNodes if there is none.
  SIMT_DEVICE static int find_child(Smem& s, int count, int node, int token) {
    int child = kMaxNodes;
    for (int i = thread_id(); i < count; i += kThreads)
      if (i > node && s.parent[i] == node && s.token[i] == token && i < child) child = i;
    child = redux_min(child);
    if (lane_id() == 0) s.child[warp_id()] = child;
    sync_block();
    for (int w = 0; w < kWarps; w++) child = s.child[w] < child ? s.child[w] : child;
    return child;
  }

  SIMT_DEVICE static void run(const Params& q, Smem& s) {
    const VerifyGreedyParams& p = q.p;
    const int b = (int)block_idx().x, count = checked_count(p.n_nodes, b, p.nodes, 1, q.fault);
    for (int i = thread_id(); i < count; i += kThreads) {
      s.parent[i] = p.parent[(int64_t)b * p.nodes + i];
      s.token[i] = p.tokens[(int64_t)b * p.nodes + i];
    }
    sync_block();
    int32_t* path = p.path + (int64_t)b * (p.max_depth + 1);
    int32_t* out = p.out_tokens + (int64_t)b * (p.max_depth + 1);
    int node = 0, depth = 0;
    for (;; depth++) {  // ends: a child's index is above its parent's
      const int64_t row = (int64_t)b * p.logits_batch + node * p.logits_node;
      const int choice =
          p.argmax ? p.argmax[(int64_t)b * p.nodes + node] : argmax(static_cast<const T*>(p.logits) + row, p.vocab, s);
      const int child = find_child(s, count, node, choice);
      if (thread_id() == 0) {
        path[depth] = node;
        out[depth] = choice;
      }
      if (depth == p.max_depth || child == kMaxNodes) break;
      node = child;
      sync_block();
    }
    for (int i = depth + 1 + thread_id(); i <= p.max_depth; i += kThreads) path[i] = out[i] = -1;
    if (thread_id() == 0) p.accept_len[b] = depth;
  }
};

}  // namespace tilewise::speculative
