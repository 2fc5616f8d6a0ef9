// Warp-wide matrix instructions: twin of device/mma.h.
#pragma once
#include "runtime.h"

namespace simt {

SIMT_DEVICE void ldmatrix_x1(uint32_t (&r)[1], const void* row, SIMT_AT) {
  rt::ldmatrix(r, 1, row, false, SIMT_SITE);
}
SIMT_DEVICE void ldmatrix_x1_trans(uint32_t (&r)[1], const void* row, SIMT_AT) {
  rt::ldmatrix(r, 1, row, true, SIMT_SITE);
}
SIMT_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row, SIMT_AT) {
  rt::ldmatrix(r, 2, row, false, SIMT_SITE);
}
SIMT_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, SIMT_AT) {
  rt::ldmatrix(r, 2, row, true, SIMT_SITE);
}
SIMT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row, SIMT_AT) {
  rt::ldmatrix(r, 4, row, false, SIMT_SITE);
}
SIMT_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, SIMT_AT) {
  rt::ldmatrix(r, 4, row, true, SIMT_SITE);
}
SIMT_DEVICE void stmatrix_x4(void* row, const uint32_t (&r)[4], SIMT_AT) {
  rt::stmatrix(r, 4, row, false, SIMT_SITE);
}
SIMT_DEVICE void stmatrix_x4_trans(void* row, const uint32_t (&r)[4], SIMT_AT) {
  rt::stmatrix(r, 4, row, true, SIMT_SITE);
}

template <class T>
SIMT_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_AT) {
  rt::mma_m16n8k16(d, a, b0, b1, is_same_v<T, bf16>, SIMT_SITE);
}
template <class T>
SIMT_DEVICE void mma_m16n8k16_zero(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_AT) {
  d[0] = d[1] = d[2] = d[3] = 0.f;
  rt::mma_m16n8k16(d, a, b0, b1, is_same_v<T, bf16>, SIMT_SITE);
}
SIMT_DEVICE void mma_m16n8k16_zero_fp16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_AT) {
  mma_m16n8k16_zero<fp16>(d, a, b0, b1, file_, line_);
}
SIMT_DEVICE void mma_m16n8k16_acc16(uint32_t (&d)[2], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_AT) {
  rt::mma_m16n8k16_acc16(d, a, b0, b1, SIMT_SITE);
}
SIMT_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_AT) {
  rt::mma_m16n8k8_tf32(d, a, b0, b1, SIMT_SITE);
}
SIMT_DEVICE void mma_m16n8k16_s8(int32_t (&d)[4], const uint32_t (&a)[2], uint32_t b0, SIMT_AT) {
  rt::mma_s8(d, a, &b0, 16, SIMT_SITE);
}
SIMT_DEVICE void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_AT) {
  const uint32_t b[2] = {b0, b1};
  rt::mma_s8(d, a, b, 32, SIMT_SITE);
}
template <class T, int Selector>
SIMT_DEVICE void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata,
                                 SIMT_AT) {
  static_assert(Selector == 0 || Selector == 1, "one of the two lane pairs of a quad");
  rt::mma_sp_m16n8k32(d, a, b, metadata, Selector, is_same_v<T, bf16>, SIMT_SITE);
}

}  // namespace simt
