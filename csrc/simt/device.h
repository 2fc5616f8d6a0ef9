// device.h - CUDA back-end: thin inline-PTX wrappers. No logic lives here.
#pragma once
#include <cuda_runtime.h>
#include <cuda.h>
#define SIMT_EMULATED 0
#define SIMT_DEVICE __device__ __forceinline__
#define SIMT_HD __host__ __device__ __forceinline__
#define SIMT_GRID_CONSTANT __grid_constant__

#include "device_wgmma.h"

namespace simt {
using TensorMap = CUtensorMap;

// ---- indices ----
SIMT_DEVICE int thread_id() { return (int)threadIdx.x; }
SIMT_DEVICE int lane_id() { return (int)(threadIdx.x & 31); }
SIMT_DEVICE int warp_id() { return (int)(threadIdx.x >> 5); }
SIMT_DEVICE dim3 block_idx() { return blockIdx; }
SIMT_DEVICE dim3 grid_dim() { return gridDim; }

// ---- synchronisation ----
SIMT_DEVICE void sync_block() { __syncthreads(); }
SIMT_DEVICE void sync_warp(uint32_t mask = 0xffffffffu) { __syncwarp(mask); }
SIMT_DEVICE void bar_sync(int id, int n) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n) : "memory"); }
SIMT_DEVICE void bar_arrive(int id, int n) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(n) : "memory"); }

// ---- warp collectives ----
template <class T> SIMT_DEVICE T shfl_xor(T v, int m, uint32_t mask = 0xffffffffu) { return __shfl_xor_sync(mask, v, m); }
template <class T> SIMT_DEVICE T shfl(T v, int src, uint32_t mask = 0xffffffffu) { return __shfl_sync(mask, v, src); }
template <class T> SIMT_DEVICE T shfl_down(T v, int d, uint32_t mask = 0xffffffffu) { return __shfl_down_sync(mask, v, d); }
SIMT_DEVICE uint32_t ballot(bool p, uint32_t mask = 0xffffffffu) { return __ballot_sync(mask, p); }
SIMT_DEVICE uint32_t redux_add(uint32_t v, uint32_t mask = 0xffffffffu) { return __reduce_add_sync(mask, v); }
SIMT_DEVICE bool elect_one() {
#if __CUDA_ARCH__ >= 900
  uint32_t p;
  asm volatile("{.reg .pred P; elect.sync _|P, 0xffffffff; selp.u32 %0,1,0,P;}" : "=r"(p));
  return p;
#else
  return lane_id() == 0;
#endif
}

// ---- scalar helpers ----
SIMT_DEVICE float exp2_approx(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
SIMT_DEVICE float log2_approx(float x) { float y; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
SIMT_DEVICE float rcp_approx(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
template <class T> SIMT_DEVICE uint32_t pack2(float lo, float hi);
template <> SIMT_DEVICE uint32_t pack2<bf16>(float lo, float hi) { uint32_t r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo)); return r; }
template <> SIMT_DEVICE uint32_t pack2<fp16>(float lo, float hi) { uint32_t r; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo)); return r; }
SIMT_DEVICE void atomic_add(float* p, float v) { atomicAdd(p, v); }

// packed fp16 arithmetic (both halves round to nearest even)
SIMT_DEVICE uint32_t hmul2(uint32_t a, uint32_t b) { uint32_t r; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
SIMT_DEVICE uint32_t hfma2(uint32_t a, uint32_t b, uint32_t c) { uint32_t r; asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c)); return r; }
SIMT_DEVICE uint32_t hneg2(uint32_t a) { uint32_t r; asm("neg.f16x2 %0, %1;" : "=r"(r) : "r"(a)); return r; }
SIMT_DEVICE float to_f32(fp16 v) { float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v.bits)); return r; }
SIMT_DEVICE float to_f32(bf16 v) { return __uint_as_float((uint32_t)v.bits << 16); }
SIMT_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t sel) { return __byte_perm(a, b, sel); }
SIMT_DEVICE uint32_t f32_bits(float v) { return __float_as_uint(v); }
SIMT_DEVICE float bits_f32(uint32_t v) { return __uint_as_float(v); }
SIMT_DEVICE uint32_t bit_reverse(uint32_t v) { return __brev(v); }
// (cos(pi x), sin(pi x)), accurate to 2 ulp
SIMT_DEVICE float2 cos_sin_pi(float x) { float2 r; sincospif(x, &r.y, &r.x); return r; }

// ---- memory ----
SIMT_DEVICE uint32_t smem_addr(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
SIMT_DEVICE uint4 load16(const void* p) { return *reinterpret_cast<const uint4*>(p); }
SIMT_DEVICE void store16(void* p, uint4 v) { *reinterpret_cast<uint4*>(p) = v; }
// 16-byte async copy; when pred is false the destination is zero-filled and src is not read.
SIMT_DEVICE void cp_async16(void* dst, const void* src, bool pred = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_addr(dst)), "l"(src), "r"(pred ? 16 : 0) : "memory");
}
SIMT_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> SIMT_DEVICE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
SIMT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem_addr(p)) : "memory");
}
SIMT_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem_addr(p)) : "memory");
}

// ---- mma.sync m16n8k16, fp32 accumulate ----
template <class T> SIMT_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <> SIMT_DEVICE void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> SIMT_DEVICE void mma_m16n8k16<fp16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// D = A B: the accumulator input is the zero register, so no registers have to be cleared first
SIMT_DEVICE void mma_m16n8k16_zero_fp16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
}

// ---- mbarrier / TMA / wgmma (sm_90a) ----
SIMT_DEVICE void mbar_init(uint64_t* b, uint32_t count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_addr(b)), "r"(count) : "memory"); }
SIMT_DEVICE void fence_mbar_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
SIMT_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
SIMT_DEVICE void mbar_arrive(uint64_t* b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_addr(b)) : "memory"); }
SIMT_DEVICE void mbar_arrive_expect_tx(uint64_t* b, uint32_t bytes) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_addr(b)), "r"(bytes) : "memory"); }
SIMT_DEVICE void mbar_wait(uint64_t* b, uint32_t parity) {
  asm volatile("{.reg .pred P; L: mbarrier.try_wait.parity.shared::cta.b64 P, [%0], %1; @P bra D; bra L; D:}" ::"r"(smem_addr(b)), "r"(parity) : "memory");
}
SIMT_DEVICE void tma_load_2d(void* dst, const TensorMap* m, uint64_t* bar, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(smem_addr(dst)), "l"(m), "r"(smem_addr(bar)), "r"(c0), "r"(c1) : "memory");
}
SIMT_DEVICE void tma_load_3d(void* dst, const TensorMap* m, uint64_t* bar, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(smem_addr(dst)), "l"(m), "r"(smem_addr(bar)), "r"(c0), "r"(c1), "r"(c2) : "memory");
}
SIMT_DEVICE void tma_load_4d(void* dst, const TensorMap* m, uint64_t* bar, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(smem_addr(dst)), "l"(m), "r"(smem_addr(bar)), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
SIMT_DEVICE void tma_load_5d(void* dst, const TensorMap* m, uint64_t* bar, int c0, int c1, int c2, int c3, int c4) {
  asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(smem_addr(dst)), "l"(m), "r"(smem_addr(bar)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4) : "memory");
}
// TMA stores: per-thread groups; elements outside the tensor are not written.
SIMT_DEVICE void tma_store_2d(const TensorMap* m, const void* src, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(m), "r"(smem_addr(src)), "r"(c0), "r"(c1) : "memory");
}
SIMT_DEVICE void tma_store_3d(const TensorMap* m, const void* src, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(m), "r"(smem_addr(src)), "r"(c0), "r"(c1), "r"(c2) : "memory");
}
SIMT_DEVICE void tma_store_4d(const TensorMap* m, const void* src, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(m), "r"(smem_addr(src)), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
SIMT_DEVICE void tma_store_5d(const TensorMap* m, const void* src, int c0, int c1, int c2, int c3, int c4) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(m), "r"(smem_addr(src)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4) : "memory");
}
SIMT_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N> SIMT_DEVICE void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"); }  // sources may be reused
SIMT_DEVICE void prefetch_tensor_map(const TensorMap* m) { asm volatile("prefetch.tensormap [%0];" ::"l"(m) : "memory"); }
template <int N> SIMT_DEVICE void reg_dealloc() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> SIMT_DEVICE void reg_alloc() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
SIMT_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
SIMT_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N, int M> SIMT_DEVICE void wgmma_wait(float (&d)[M]) {
#pragma unroll
  for (int i = 0; i < M; i++) asm volatile("" : "+f"(d[i])::"memory");
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#pragma unroll
  for (int i = 0; i < M; i++) asm volatile("" : "+f"(d[i])::"memory");
}
// D[64 x N] (+)= A[64 x 16] * B[16 x N]. ss: both operands in shared memory through descriptors; rs: A is this thread's register
// fragment, which like D must stay untouched until the wait. TransB = 1 for an N-major B.
template <class T, int N, int TransB> SIMT_DEVICE void wgmma_ss(float (&d)[N / 2], uint64_t da, uint64_t db, bool accumulate) { detail::Wgmma<T, N, TransB>::ss(d, da, db, (int)accumulate); }
template <class T, int N, int TransB> SIMT_DEVICE void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t db, bool accumulate) { detail::Wgmma<T, N, TransB>::rs(d, a, db, (int)accumulate); }

// ---- launch ----
// A kernel is a struct K { struct Params; struct Smem; static constexpr int kThreads; static void run(const Params&, Smem&); }.
// kMinBlocks (optional, default 1) fixes the register budget: without it ptxas ignores setmaxnreg.
template <class K, class = void> struct min_blocks { static constexpr int value = 1; };
template <class K> struct min_blocks<K, decltype((void)K::kMinBlocks)> { static constexpr int value = K::kMinBlocks; };
template <class K> __global__ void __launch_bounds__(K::kThreads, min_blocks<K>::value) kernel_entry(const __grid_constant__ typename K::Params p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int arch = 901;
#elif defined(__CUDA_ARCH__)
  constexpr int arch = __CUDA_ARCH__;
#else
  constexpr int arch = 0;
#endif
  extern __shared__ __align__(1024) unsigned char simt_dynamic_smem[];
  if constexpr (arch >= K::kMinArch && (K::kMinArch < 901 || arch == 901))
    K::run(p, *reinterpret_cast<typename K::Smem*>(simt_dynamic_smem));
}
template <class K> inline const char* launch(dim3 grid, const typename K::Params& p, void* stream) {
  cudaError_t e = cudaFuncSetAttribute(kernel_entry<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)sizeof(typename K::Smem));
  if (e == cudaSuccess) {
    kernel_entry<K><<<grid, K::kThreads, sizeof(typename K::Smem), (cudaStream_t)stream>>>(p);
    e = cudaGetLastError();
  }
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}
// dims and box in elements, innermost first; strides in bytes for dimensions 1.. (rank - 1 values).
inline const char* make_tensor_map_sw128(TensorMap* m, const void* base, int elem_bytes, int rank, const uint64_t* dims, const uint64_t* strides, const uint32_t* box) {
  void* fn = nullptr;
  cudaDriverEntryPointQueryResult q;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &fn, 12000, cudaEnableDefault, &q) != cudaSuccess || !fn) return "no cuTensorMapEncodeTiled";
  cuuint64_t d[5], st[4];
  cuuint32_t b[5], es[5];
  for (int i = 0; i < rank; i++) { d[i] = dims[i]; b[i] = box[i]; es[i] = 1; if (i) st[i - 1] = strides[i - 1]; }
  auto dt = elem_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  CUresult r = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(fn)(m, dt, (cuuint32_t)rank, const_cast<void*>(base), d, st, b, es, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return r == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled failed";
}
}  // namespace simt
