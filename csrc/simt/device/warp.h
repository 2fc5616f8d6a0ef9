// Indices, barriers, fences and warp collectives.
#pragma once

namespace simt {

SIMT_DEVICE int thread_id() {
  return static_cast<int>(threadIdx.x);
}
SIMT_DEVICE int lane_id() {
  return static_cast<int>(threadIdx.x & 31);
}
SIMT_DEVICE int warp_id() {
  return static_cast<int>(threadIdx.x >> 5);
}
SIMT_DEVICE dim3 block_idx() {
  return dim3(blockIdx.x, blockIdx.y, blockIdx.z);
}
SIMT_DEVICE dim3 block_dim() {
  return dim3(blockDim.x, blockDim.y, blockDim.z);
}
SIMT_DEVICE dim3 grid_dim() {
  return dim3(gridDim.x, gridDim.y, gridDim.z);
}

SIMT_DEVICE void sync_block() {
  __syncthreads();
}
SIMT_DEVICE void sync_warp(uint32_t mask = kFullMask) {
  __syncwarp(mask);
}
SIMT_DEVICE void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
SIMT_DEVICE void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Orders this thread's earlier writes (and what it has observed) before its later atomics, device-wide.
SIMT_DEVICE void fence_device() {
  __threadfence();
}

template <class T>
SIMT_DEVICE T shfl(T v, int lane, uint32_t mask = kFullMask) {
  return __shfl_sync(mask, v, lane);
}
template <class T>
SIMT_DEVICE T shfl_xor(T v, int lane_mask, uint32_t mask = kFullMask) {
  return __shfl_xor_sync(mask, v, lane_mask);
}
// Lanes whose source would fall off the warp keep their own value.
template <class T>
SIMT_DEVICE T shfl_up(T v, int delta, uint32_t mask = kFullMask) {
  return __shfl_up_sync(mask, v, delta);
}
template <class T>
SIMT_DEVICE T shfl_down(T v, int delta, uint32_t mask = kFullMask) {
  return __shfl_down_sync(mask, v, delta);
}

// CUDA still has global ballot, any and all of its own: hence the prefix.
SIMT_DEVICE uint32_t warp_ballot(bool predicate, uint32_t mask = kFullMask) {
  return __ballot_sync(mask, predicate);
}
SIMT_DEVICE bool warp_any(bool predicate, uint32_t mask = kFullMask) {
  return __any_sync(mask, predicate);
}
SIMT_DEVICE bool warp_all(bool predicate, uint32_t mask = kFullMask) {
  return __all_sync(mask, predicate);
}
// The lanes of `mask` that hold the same value as this one.
SIMT_DEVICE uint32_t match_any(uint32_t v, uint32_t mask = kFullMask) {
  return __match_any_sync(mask, v);
}

// One-instruction integer reductions; Int is int or uint32_t.
template <class Int>
SIMT_DEVICE Int redux_add(Int v, uint32_t mask = kFullMask) {
  return __reduce_add_sync(mask, v);
}
template <class Int>
SIMT_DEVICE Int redux_min(Int v, uint32_t mask = kFullMask) {
  return __reduce_min_sync(mask, v);
}
template <class Int>
SIMT_DEVICE Int redux_max(Int v, uint32_t mask = kFullMask) {
  return __reduce_max_sync(mask, v);
}

// True in exactly one lane of the full, converged warp.
SIMT_DEVICE bool elect_one() {
#if __CUDA_ARCH__ >= 900
  uint32_t elected;
  asm volatile("{.reg .pred P; elect.sync _|P, 0xffffffff; selp.u32 %0, 1, 0, P;}" : "=r"(elected));
  return elected;
#else
  return lane_id() == 0;
#endif
}

}  // namespace simt
