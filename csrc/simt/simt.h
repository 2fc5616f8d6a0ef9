// simt.h - the one header kernels include.  Same kernel source, two back-ends:
//   nvcc  -> simt/device.h  (inline PTX)
//   g++   -> simt/host.h    (fibers; see host.h)
// Everything a kernel may use beyond plain C++ is declared by both back-ends, in namespace simt.
#pragma once
#include <stdint.h>
#include <stddef.h>

namespace simt {
struct bf16 { uint16_t bits; };   // storage types only: arithmetic happens in float or in mma
struct fp16 { uint16_t bits; };
}  // namespace simt

#if defined(__CUDACC__)
#include "device.h"
#else
#include "host.h"
#endif

namespace simt {
constexpr int kWarp = 32;
template <class A, class B> struct is_same { static constexpr bool value = false; };
template <class A> struct is_same<A, A> { static constexpr bool value = true; };
template <class A, class B> inline constexpr bool is_same_v = is_same<A, B>::value;
constexpr uint32_t kFullMask = 0xffffffffu;
SIMT_HD constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// 64-bit wgmma shared-memory matrix descriptor (PTX ISA "Matrix descriptor format"), 128-byte swizzle.
SIMT_DEVICE uint64_t wgmma_desc_sw128(uint32_t smem_addr, uint32_t lbo_bytes, uint32_t sbo_bytes) {
  return (uint64_t)((smem_addr & 0x3FFFF) >> 4) | ((uint64_t)((lbo_bytes & 0x3FFFF) >> 4) << 16) |
         ((uint64_t)((sbo_bytes & 0x3FFFF) >> 4) << 32) | ((uint64_t)1 << 62);
}
// The same descriptor `bytes` further on (a multiple of 16): addresses stay below 2^18, so the address field never carries.
SIMT_DEVICE uint64_t wgmma_desc_advance(uint64_t desc, uint32_t bytes) { return desc + (bytes >> 4); }
inline const char* make_tensor_map_2d_sw128(TensorMap* m, const void* base, int elem_bytes, uint64_t inner, uint64_t outer, uint64_t row_bytes, uint32_t box_inner, uint32_t box_outer) {
  const uint64_t dims[2] = {inner, outer};
  const uint32_t box[2] = {box_inner, box_outer};
  return make_tensor_map_sw128(m, base, elem_bytes, 2, dims, &row_bytes, box);
}
template <class T> SIMT_DEVICE T warp_max(T v, int width = 32) {
#pragma unroll
  for (int o = width / 2; o > 0; o >>= 1) { T w = shfl_xor(v, o); v = v > w ? v : w; }
  return v;
}
template <class T> SIMT_DEVICE T warp_sum(T v, int width = 32) {
#pragma unroll
  for (int o = width / 2; o > 0; o >>= 1) v += shfl_xor(v, o);
  return v;
}
}  // namespace simt
