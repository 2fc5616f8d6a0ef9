// Loads, stores, atomics and cp.async.
#pragma once

namespace simt {

SIMT_DEVICE uint32_t smem_addr(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- naturally aligned raw loads and stores of 2, 4, 8, 16 bytes ----
SIMT_DEVICE uint16_t load2(const void* p) {
  return *static_cast<const uint16_t*>(p);
}
SIMT_DEVICE uint32_t load4(const void* p) {
  return *static_cast<const uint32_t*>(p);
}
SIMT_DEVICE uint2 load8(const void* p) {
  return *static_cast<const uint2*>(p);
}
SIMT_DEVICE uint4 load16(const void* p) {
  return *static_cast<const uint4*>(p);
}
SIMT_DEVICE void store2(void* p, uint16_t v) {
  *static_cast<uint16_t*>(p) = v;
}
SIMT_DEVICE void store4(void* p, uint32_t v) {
  *static_cast<uint32_t*>(p) = v;
}
SIMT_DEVICE void store8(void* p, uint2 v) {
  *static_cast<uint2*>(p) = v;
}
SIMT_DEVICE void store16(void* p, uint4 v) {
  *static_cast<uint4*>(p) = v;
}

// Global data that is read or written once: it should not push reusable lines out of the caches.
SIMT_DEVICE uint4 load16_stream(const void* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
SIMT_DEVICE void store16_stream(void* p, uint4 v) {
  __stcs(static_cast<uint4*>(p), v);
}
// Global data that no thread writes during the kernel.
SIMT_DEVICE uint4 load16_const(const void* p) {
  return __ldg(static_cast<const uint4*>(p));
}

// ---- 32-bit atomics on global or shared memory, relaxed; they return the old value ----
SIMT_DEVICE float atomic_add(float* p, float v) {
  return atomicAdd(p, v);
}
SIMT_DEVICE int32_t atomic_add(int32_t* p, int32_t v) {
  return atomicAdd(p, v);
}
SIMT_DEVICE uint32_t atomic_add(uint32_t* p, uint32_t v) {
  return atomicAdd(p, v);
}
SIMT_DEVICE int32_t atomic_max(int32_t* p, int32_t v) {
  return atomicMax(p, v);
}
SIMT_DEVICE uint32_t atomic_max(uint32_t* p, uint32_t v) {
  return atomicMax(p, v);
}
SIMT_DEVICE int32_t atomic_min(int32_t* p, int32_t v) {
  return atomicMin(p, v);
}
SIMT_DEVICE uint32_t atomic_min(uint32_t* p, uint32_t v) {
  return atomicMin(p, v);
}
SIMT_DEVICE uint32_t atomic_or(uint32_t* p, uint32_t v) {
  return atomicOr(p, v);
}
SIMT_DEVICE uint32_t atomic_and(uint32_t* p, uint32_t v) {
  return atomicAnd(p, v);
}
SIMT_DEVICE uint32_t atomic_exch(uint32_t* p, uint32_t v) {
  return atomicExch(p, v);
}
SIMT_DEVICE uint32_t atomic_cas(uint32_t* p, uint32_t expected, uint32_t v) {
  return atomicCAS(p, expected, v);
}

// ---- cp.async: where the predicate is false the destination is zero-filled and src is not read ----
SIMT_DEVICE void cp_async16(void* dst, const void* src, bool predicate = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_addr(dst)), "l"(src), "r"(predicate ? 16 : 0)
               : "memory");
}
SIMT_DEVICE void cp_async8(void* dst, const void* src, bool predicate = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(smem_addr(dst)), "l"(src), "r"(predicate ? 8 : 0)
               : "memory");
}
SIMT_DEVICE void cp_async4(void* dst, const void* src, bool predicate = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem_addr(dst)), "l"(src), "r"(predicate ? 4 : 0)
               : "memory");
}
SIMT_DEVICE void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most N of this thread's newest groups are pending.
template <int N>
SIMT_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

}  // namespace simt
