// The one header that kernels include. The same kernel source has two back-ends:
//   nvcc -> device.h: inline PTX
//   g++  -> host.h:   every CUDA thread a fiber of the emulator
// Both declare the same names in namespace simt; csrc/simt/README.md lists them.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>

namespace simt {

// Storage types only: arithmetic happens in float, in the packed helpers or on the tensor cores.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <class A, class B>
inline constexpr bool is_same_v = false;
template <class A>
inline constexpr bool is_same_v<A, A> = true;

constexpr int kWarp = 32;
constexpr uint32_t kFullMask = 0xffffffffu;

// kMinArch of kernels that use the sm_90a-only instructions (wgmma, setmaxnreg): such code runs on compute capability
// 9.0 and nothing else. Plain values (800, 900) mean "this or anything later".
constexpr int kSm90a = 901;
constexpr bool arch_runs(int device_arch, int min_arch) {
  return min_arch == kSm90a ? device_arch == 900 || device_arch == kSm90a : device_arch >= min_arch;
}

}  // namespace simt

#if defined(__CUDACC__)
#include "device.h"
#else
#include "host.h"
#endif

namespace simt {

template <class Int>
SIMT_HD constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

// Butterfly reductions over aligned groups of `width` lanes; every lane gets the result.
template <class T>
SIMT_DEVICE T warp_max(T v, int width = kWarp) {
#pragma unroll
  for (int offset = width / 2; offset > 0; offset >>= 1) {
    const T other = shfl_xor(v, offset);
    v = v > other ? v : other;
  }
  return v;
}
template <class T>
SIMT_DEVICE T warp_sum(T v, int width = kWarp) {
#pragma unroll
  for (int offset = width / 2; offset > 0; offset >>= 1) v += shfl_xor(v, offset);
  return v;
}

// Shared memory behind Smem, granted by launch<K>(grid, params, stream, extra_smem_bytes).
template <class Smem>
SIMT_DEVICE unsigned char* extra_smem(Smem& s) {
  return reinterpret_cast<unsigned char*>(&s) + sizeof(Smem);
}

// wgmma matrix descriptor of a 128-byte-swizzled tile in shared memory: address, leading and stride byte offsets are
// stored without their low four bits; 1 << 62 names the swizzle.
SIMT_DEVICE uint64_t wgmma_desc_sw128(uint32_t smem_address, uint32_t lbo_bytes, uint32_t sbo_bytes) {
  constexpr auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  return field(smem_address) | field(lbo_bytes) << 16 | field(sbo_bytes) << 32 | uint64_t{1} << 62;
}

// The same descriptor `bytes` further on (a multiple of 16). Addresses stay below 2^18, so the field never carries.
SIMT_DEVICE uint64_t wgmma_desc_advance(uint64_t desc, uint32_t bytes) {
  return desc + (bytes >> 4);
}

inline const char* make_tensor_map_2d_sw128(TensorMap* map, const void* base, int elem_bytes, uint64_t inner,
                                            uint64_t outer, uint64_t row_bytes, uint32_t box_inner,
                                            uint32_t box_outer) {
  const uint64_t dims[2] = {inner, outer};
  const uint32_t box[2] = {box_inner, box_outer};
  return make_tensor_map_sw128(map, base, elem_bytes, 2, dims, &row_bytes, box);
}

}  // namespace simt
