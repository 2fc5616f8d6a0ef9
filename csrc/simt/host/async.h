// sm_90: mbarriers, bulk and tensor copies (TMA), wgmma: twin of device/async.h.
#pragma once
#include "runtime.h"

namespace simt {

SIMT_DEVICE void mbar_init(uint64_t* bar, uint32_t count, SIMT_AT) {
  rt::mbar_init(bar, count, SIMT_SITE);
}
SIMT_DEVICE void fence_mbar_init() {}
SIMT_DEVICE void fence_proxy_async() {
  rt::fence_proxy_async();
}
SIMT_DEVICE void mbar_arrive(uint64_t* bar, SIMT_AT) {
  rt::mbar_arrive(bar, 0, SIMT_SITE);
}
SIMT_DEVICE void mbar_arrive_expect_tx(uint64_t* bar, uint32_t bytes, SIMT_AT) {
  rt::mbar_arrive(bar, bytes, SIMT_SITE);
}
SIMT_DEVICE void mbar_wait(uint64_t* bar, uint32_t parity, SIMT_AT) {
  rt::mbar_wait(bar, parity, SIMT_SITE);
}

SIMT_DEVICE void bulk_load(void* dst, const void* src, uint32_t bytes, uint64_t* bar, SIMT_AT) {
  rt::bulk_load(dst, src, bytes, bar, SIMT_SITE);
}
SIMT_DEVICE void bulk_store(void* dst, const void* src, uint32_t bytes, SIMT_AT) {
  rt::bulk_store(dst, src, bytes, SIMT_SITE);
}

SIMT_DEVICE void tma_load_2d(void* dst, const TensorMap* map, uint64_t* bar, int c0, int c1, SIMT_AT) {
  rt::tma_load(dst, map, bar, 2, {{c0, c1, 0, 0, 0}}, SIMT_SITE);
}
SIMT_DEVICE void tma_load_3d(void* dst, const TensorMap* map, uint64_t* bar, int c0, int c1, int c2, SIMT_AT) {
  rt::tma_load(dst, map, bar, 3, {{c0, c1, c2, 0, 0}}, SIMT_SITE);
}
SIMT_DEVICE void tma_load_4d(void* dst, const TensorMap* map, uint64_t* bar, int c0, int c1, int c2, int c3, SIMT_AT) {
  rt::tma_load(dst, map, bar, 4, {{c0, c1, c2, c3, 0}}, SIMT_SITE);
}
SIMT_DEVICE void tma_load_5d(void* dst, const TensorMap* map, uint64_t* bar, int c0, int c1, int c2, int c3, int c4,
                             SIMT_AT) {
  rt::tma_load(dst, map, bar, 5, {{c0, c1, c2, c3, c4}}, SIMT_SITE);
}
SIMT_DEVICE void tma_store_2d(const TensorMap* map, const void* src, int c0, int c1, SIMT_AT) {
  rt::tma_store(map, src, 2, {{c0, c1, 0, 0, 0}}, SIMT_SITE);
}
SIMT_DEVICE void tma_store_3d(const TensorMap* map, const void* src, int c0, int c1, int c2, SIMT_AT) {
  rt::tma_store(map, src, 3, {{c0, c1, c2, 0, 0}}, SIMT_SITE);
}
SIMT_DEVICE void tma_store_4d(const TensorMap* map, const void* src, int c0, int c1, int c2, int c3, SIMT_AT) {
  rt::tma_store(map, src, 4, {{c0, c1, c2, c3, 0}}, SIMT_SITE);
}
SIMT_DEVICE void tma_store_5d(const TensorMap* map, const void* src, int c0, int c1, int c2, int c3, int c4, SIMT_AT) {
  rt::tma_store(map, src, 5, {{c0, c1, c2, c3, c4}}, SIMT_SITE);
}
SIMT_DEVICE void bulk_commit() {
  rt::bulk_commit();
}
template <int N>
SIMT_DEVICE void bulk_wait_read() {
  rt::bulk_wait_read(N);
}
SIMT_DEVICE void prefetch_tensor_map(const TensorMap*) {}

template <int Registers>
SIMT_DEVICE void reg_dealloc(SIMT_AT) {
  static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256, "setmaxnreg: 24 to 256 in steps of 8");
  rt::set_max_reg(Registers, false, SIMT_SITE);
}
template <int Registers>
SIMT_DEVICE void reg_alloc(SIMT_AT) {
  static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256, "setmaxnreg: 24 to 256 in steps of 8");
  rt::set_max_reg(Registers, true, SIMT_SITE);
}

SIMT_DEVICE void wgmma_fence(SIMT_AT) {
  rt::wgmma_fence(SIMT_SITE);
}
SIMT_DEVICE void wgmma_commit(SIMT_AT) {
  rt::wgmma_commit(SIMT_SITE);
}
template <int N, int M>
SIMT_DEVICE void wgmma_wait(float (&)[M], SIMT_AT) {
  rt::wgmma_wait(N, SIMT_SITE);
}
template <class T, int N, int TransB, int TransA = 0>
SIMT_DEVICE void wgmma_ss(float (&d)[N / 2], uint64_t desc_a, uint64_t desc_b, bool accumulate, SIMT_AT) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256, "wgmma: N is 8 to 256 in steps of 8");
  rt::wgmma({N, false, TransA != 0, TransB != 0, is_same_v<T, bf16>}, d, nullptr, desc_a, desc_b, accumulate,
            SIMT_SITE);
}
template <class T, int N, int TransB>
SIMT_DEVICE void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t desc_b, bool accumulate, SIMT_AT) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256, "wgmma: N is 8 to 256 in steps of 8");
  rt::wgmma({N, true, false, TransB != 0, is_same_v<T, bf16>}, d, a, 0, desc_b, accumulate, SIMT_SITE);
}

// Checks what cuTensorMapEncodeTiled checks.
const char* make_tensor_map_sw128(TensorMap* map, const void* base, int elem_bytes, int rank, const uint64_t* dims,
                                  const uint64_t* strides, const uint32_t* box);

}  // namespace simt
