// Indices, barriers, fences and warp collectives: twin of device/warp.h.
#pragma once
#include "runtime.h"

namespace simt {

SIMT_DEVICE int thread_id() {
  return rt::current->tid;
}
SIMT_DEVICE int lane_id() {
  return rt::current->lane;
}
SIMT_DEVICE int warp_id() {
  return rt::current->warp;
}
SIMT_DEVICE dim3 block_idx() {
  return rt::current->block;
}
SIMT_DEVICE dim3 block_dim() {
  return rt::current->block_dim;
}
SIMT_DEVICE dim3 grid_dim() {
  return rt::current->grid;
}

SIMT_DEVICE void sync_block(SIMT_AT) {
  rt::barrier(0, -1, true, SIMT_SITE);
}
SIMT_DEVICE void sync_warp(uint32_t mask = kFullMask, SIMT_AT) {
  rt::warp_sync(mask, SIMT_SITE);
}
SIMT_DEVICE void bar_sync(int id, int threads, SIMT_AT) {
  rt::barrier(id, threads, true, SIMT_SITE);
}
SIMT_DEVICE void bar_arrive(int id, int threads, SIMT_AT) {
  rt::barrier(id, threads, false, SIMT_SITE);
}
SIMT_DEVICE void fence_device() {
  rt::fence_device();
}

namespace rt {

template <class T>
struct ShuffleArgs {
  T value, result;
  int source;
};

template <class T>
void shuffle_op(void** args, uint32_t mask, Site at) {
  for (int lane = 0; lane < kWarp; lane++) {
    if (!(mask >> lane & 1)) continue;
    auto* a = static_cast<ShuffleArgs<T>*>(args[lane]);
    if (!(mask >> a->source & 1)) shuffle_source_missing(lane, a->source, mask, at);
    a->result = static_cast<ShuffleArgs<T>*>(args[a->source])->value;
  }
}

template <class T>
T shuffle(T value, int source, uint32_t mask, Site at) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 32- or 64-bit values");
  ShuffleArgs<T> args{value, value, source};
  warp_collective(mask, &shuffle_op<T>, &args, "shfl", at);
  return args.result;
}

template <class T>
struct VoteArgs {
  T value, result;
};

// The same result for every lane: fold(accumulated, value, lane), starting from the lowest lane's fold(init, ...).
template <class T, class Fold>
void vote_op(void** args, uint32_t mask, Site) {
  T result{};
  bool first = true;
  for (int lane = 0; lane < kWarp; lane++) {
    if (!(mask >> lane & 1)) continue;
    const T value = static_cast<VoteArgs<T>*>(args[lane])->value;
    result = Fold::fold(first, result, value, lane);
    first = false;
  }
  for (int lane = 0; lane < kWarp; lane++) {
    if (mask >> lane & 1) static_cast<VoteArgs<T>*>(args[lane])->result = result;
  }
}

template <class T, class Fold>
T vote(T value, uint32_t mask, const char* name, Site at) {
  VoteArgs<T> args{value, T{}};
  warp_collective(mask, &vote_op<T, Fold>, &args, name, at);
  return args.result;
}

struct FoldBallot {
  static uint32_t fold(bool, uint32_t acc, uint32_t v, int lane) { return acc | (v ? 1u << lane : 0u); }
};
template <class T>
struct FoldAdd {  // wraps around, as the instruction does
  static T fold(bool, T acc, T v, int) { return static_cast<T>(static_cast<uint32_t>(acc) + static_cast<uint32_t>(v)); }
};
template <class T>
struct FoldMin {
  static T fold(bool first, T acc, T v, int) { return first || v < acc ? v : acc; }
};
template <class T>
struct FoldMax {
  static T fold(bool first, T acc, T v, int) { return first || v > acc ? v : acc; }
};

void match_any_op(void** args, uint32_t mask, Site);  // args: VoteArgs<uint32_t>

}  // namespace rt

template <class T>
SIMT_DEVICE T shfl(T v, int lane, uint32_t mask = kFullMask, SIMT_AT) {
  return rt::shuffle(v, lane & 31, mask, SIMT_SITE);
}
template <class T>
SIMT_DEVICE T shfl_xor(T v, int lane_mask, uint32_t mask = kFullMask, SIMT_AT) {
  const int source = lane_id() ^ lane_mask;
  return rt::shuffle(v, source < kWarp ? source : lane_id(), mask, SIMT_SITE);
}
template <class T>
SIMT_DEVICE T shfl_up(T v, int delta, uint32_t mask = kFullMask, SIMT_AT) {
  const int source = lane_id() - delta;
  return rt::shuffle(v, source >= 0 ? source : lane_id(), mask, SIMT_SITE);
}
template <class T>
SIMT_DEVICE T shfl_down(T v, int delta, uint32_t mask = kFullMask, SIMT_AT) {
  const int source = lane_id() + delta;
  return rt::shuffle(v, source < kWarp ? source : lane_id(), mask, SIMT_SITE);
}

SIMT_DEVICE uint32_t warp_ballot(bool predicate, uint32_t mask = kFullMask, SIMT_AT) {
  return rt::vote<uint32_t, rt::FoldBallot>(predicate, mask, "ballot", SIMT_SITE);
}
SIMT_DEVICE bool warp_any(bool predicate, uint32_t mask = kFullMask, SIMT_AT) {
  return rt::vote<uint32_t, rt::FoldBallot>(predicate, mask, "any", SIMT_SITE) != 0;
}
SIMT_DEVICE bool warp_all(bool predicate, uint32_t mask = kFullMask, SIMT_AT) {
  return rt::vote<uint32_t, rt::FoldBallot>(predicate, mask, "all", SIMT_SITE) == mask;
}
SIMT_DEVICE uint32_t match_any(uint32_t v, uint32_t mask = kFullMask, SIMT_AT) {
  rt::VoteArgs<uint32_t> args{v, 0};
  rt::warp_collective(mask, &rt::match_any_op, &args, "match_any", SIMT_SITE);
  return args.result;
}

template <class Int>
SIMT_DEVICE Int redux_add(Int v, uint32_t mask = kFullMask, SIMT_AT) {
  return rt::vote<Int, rt::FoldAdd<Int>>(v, mask, "redux_add", SIMT_SITE);
}
template <class Int>
SIMT_DEVICE Int redux_min(Int v, uint32_t mask = kFullMask, SIMT_AT) {
  return rt::vote<Int, rt::FoldMin<Int>>(v, mask, "redux_min", SIMT_SITE);
}
template <class Int>
SIMT_DEVICE Int redux_max(Int v, uint32_t mask = kFullMask, SIMT_AT) {
  return rt::vote<Int, rt::FoldMax<Int>>(v, mask, "redux_max", SIMT_SITE);
}

// A rendezvous all the same: the instruction demands a converged warp.
SIMT_DEVICE bool elect_one(SIMT_AT) {
  rt::vote<uint32_t, rt::FoldBallot>(1, kFullMask, "elect", SIMT_SITE);
  return lane_id() == 0;
}

}  // namespace simt
