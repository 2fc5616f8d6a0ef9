// Loads, stores, atomics and cp.async: twin of device/memory.h.
#pragma once
#include <string.h>

#include "runtime.h"

namespace simt {

SIMT_DEVICE uint32_t smem_addr(const void* p, SIMT_AT) {
  return rt::smem_addr(p, SIMT_SITE);
}

namespace rt {
// A GPU traps on a misaligned access; x86 would not.
inline void check_aligned(const char* what, const void* p, int bytes, Site at) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) misaligned(what, p, bytes, at);
}
template <class V>
SIMT_DEVICE V load(const char* what, const void* p, Site at) {
  check_aligned(what, p, sizeof(V), at);
  return *static_cast<const V*>(p);
}
template <class V>
SIMT_DEVICE void store(const char* what, void* p, V v, Site at) {
  check_aligned(what, p, sizeof(V), at);
  *static_cast<V*>(p) = v;
}
}  // namespace rt

SIMT_DEVICE uint16_t load2(const void* p, SIMT_AT) {
  return rt::load<uint16_t>("load2", p, SIMT_SITE);
}
SIMT_DEVICE uint32_t load4(const void* p, SIMT_AT) {
  return rt::load<uint32_t>("load4", p, SIMT_SITE);
}
SIMT_DEVICE uint2 load8(const void* p, SIMT_AT) {
  return rt::load<uint2>("load8", p, SIMT_SITE);
}
SIMT_DEVICE uint4 load16(const void* p, SIMT_AT) {
  return rt::load<uint4>("load16", p, SIMT_SITE);
}
SIMT_DEVICE void store2(void* p, uint16_t v, SIMT_AT) {
  rt::store("store2", p, v, SIMT_SITE);
}
SIMT_DEVICE void store4(void* p, uint32_t v, SIMT_AT) {
  rt::store("store4", p, v, SIMT_SITE);
}
SIMT_DEVICE void store8(void* p, uint2 v, SIMT_AT) {
  rt::store("store8", p, v, SIMT_SITE);
}
SIMT_DEVICE void store16(void* p, uint4 v, SIMT_AT) {
  rt::store("store16", p, v, SIMT_SITE);
}

SIMT_DEVICE uint4 load16_stream(const void* p, SIMT_AT) {
  return rt::load<uint4>("load16_stream", p, SIMT_SITE);
}
SIMT_DEVICE void store16_stream(void* p, uint4 v, SIMT_AT) {
  rt::store("store16_stream", p, v, SIMT_SITE);
}
SIMT_DEVICE uint4 load16_const(const void* p, SIMT_AT) {
  return rt::load<uint4>("load16_const", p, SIMT_SITE);
}

namespace rt {
template <class T>
T atomic(T* p, Atomic op, T operand, Site at, T expected = T{}) {
  uint32_t bits, expected_bits;
  memcpy(&bits, &operand, 4);
  memcpy(&expected_bits, &expected, 4);
  const uint32_t old = atomic32(p, op, bits, expected_bits, at);
  T result;
  memcpy(&result, &old, 4);
  return result;
}
}  // namespace rt

SIMT_DEVICE float atomic_add(float* p, float v, SIMT_AT) {
  return rt::atomic(p, rt::Atomic::kAddF32, v, SIMT_SITE);
}
SIMT_DEVICE int32_t atomic_add(int32_t* p, int32_t v, SIMT_AT) {
  return rt::atomic(p, rt::Atomic::kAdd, v, SIMT_SITE);
}
SIMT_DEVICE uint32_t atomic_add(uint32_t* p, uint32_t v, SIMT_AT) {
  return rt::atomic(p, rt::Atomic::kAdd, v, SIMT_SITE);
}
SIMT_DEVICE int32_t atomic_max(int32_t* p, int32_t v, SIMT_AT) {
  return rt::atomic(p, rt::Atomic::kMaxS32, v, SIMT_SITE);
}
SIMT_DEVICE uint32_t atomic_max(uint32_t* p, uint32_t v, SIMT_AT) {
  return rt::atomic(p, rt::Atomic::kMaxU32, v, SIMT_SITE);
}
SIMT_DEVICE int32_t atomic_min(int32_t* p, int32_t v, SIMT_AT) {
  return rt::atomic(p, rt::Atomic::kMinS32, v, SIMT_SITE);
}
SIMT_DEVICE uint32_t atomic_min(uint32_t* p, uint32_t v, SIMT_AT) {
  return rt::atomic(p, rt::Atomic::kMinU32, v, SIMT_SITE);
}
SIMT_DEVICE uint32_t atomic_or(uint32_t* p, uint32_t v, SIMT_AT) {
  return rt::atomic(p, rt::Atomic::kOr, v, SIMT_SITE);
}
SIMT_DEVICE uint32_t atomic_and(uint32_t* p, uint32_t v, SIMT_AT) {
  return rt::atomic(p, rt::Atomic::kAnd, v, SIMT_SITE);
}
SIMT_DEVICE uint32_t atomic_exch(uint32_t* p, uint32_t v, SIMT_AT) {
  return rt::atomic(p, rt::Atomic::kExch, v, SIMT_SITE);
}
SIMT_DEVICE uint32_t atomic_cas(uint32_t* p, uint32_t expected, uint32_t v, SIMT_AT) {
  return rt::atomic(p, rt::Atomic::kCas, v, SIMT_SITE, expected);
}

SIMT_DEVICE void cp_async16(void* dst, const void* src, bool predicate = true, SIMT_AT) {
  rt::cp_async(dst, src, 16, predicate, SIMT_SITE);
}
SIMT_DEVICE void cp_async8(void* dst, const void* src, bool predicate = true, SIMT_AT) {
  rt::cp_async(dst, src, 8, predicate, SIMT_SITE);
}
SIMT_DEVICE void cp_async4(void* dst, const void* src, bool predicate = true, SIMT_AT) {
  rt::cp_async(dst, src, 4, predicate, SIMT_SITE);
}
SIMT_DEVICE void cp_async_commit() {
  rt::cp_async_commit();
}
template <int N>
SIMT_DEVICE void cp_async_wait() {
  rt::cp_async_wait(N);
}

}  // namespace simt
