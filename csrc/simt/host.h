// host.h - CPU back-end of simt.h: every CUDA thread is a fiber, every warp/warpgroup collective a rendezvous.
// Same names and signatures as device.h (plus a defaulted source location used in diagnostics).
#pragma once
#include <math.h>
#include <string.h>
#define SIMT_EMULATED 1
#define SIMT_DEVICE inline
#define SIMT_HD inline
#define SIMT_GRID_CONSTANT
// two separate defaults: nested in one Site{...} default, g++ 12 would report this header instead of the call site
#define SIMT_AT const char* file_ = __builtin_FILE(), int line_ = __builtin_LINE()
#define SIMT_SITE rt::Site{file_, line_}

struct dim3 { unsigned x, y, z; constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {} };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

namespace simt {
struct alignas(64) TensorMap {  // stands in for CUtensorMap (128 bytes there); rank 2 to 5, 128-byte swizzle
  const unsigned char* base; uint64_t dim[5], stride[5]; uint32_t box[5]; int rank, elem; uint32_t magic;
};

namespace rt {  // ---- runtime (runtime.cpp) ----
struct Site { const char* file; int line; };
struct Thread { int tid, lane, warp; dim3 block, grid; unsigned char* smem; };
extern thread_local Thread* cur;

void barrier(int id, int n, bool wait, bool aligned_sites, Site);
using Op = void (*)(void** lane_args, uint32_t mask, Site);
void warp_collective(uint32_t mask, Op, void* args, const char* name, Site);
void warp_sync(uint32_t mask, Site);
uint32_t smem_addr(const void*, Site);
void cp_async(void* dst, const void* src, int bytes, bool pred, Site);
void cp_commit();
void cp_wait(int n);
void ldmatrix(uint32_t* r, const void* row, bool trans, Site);
void mma16816(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool is_bf16, Site);
void mbar_init(uint64_t*, uint32_t count, Site);
void mbar_arrive(uint64_t*, int64_t tx, Site);
void mbar_wait(uint64_t*, uint32_t parity, Site);
void proxy_fence();
struct Coord { int c[5]; };
void tma_load(void* dst, const TensorMap*, uint64_t* bar, int rank, Coord, Site);
void tma_store(const TensorMap*, const void* src, int rank, Coord, Site);
void bulk_commit();
void bulk_wait_read(int n);
void set_max_reg(int n, bool grow, Site);
void wgmma_fence(Site);
// areg != nullptr: A from registers (then da is 0)
void wgmma_mma(float* d, int n, const uint32_t* areg, uint64_t da, uint64_t db, bool trans_b, bool accumulate, bool is_bf16, Site);
void wgmma_commit(Site);
void wgmma_wait(int n, Site);
void atomic_add_f32(float*, float, Site);
float to_float(bf16); float to_float(fp16);
uint16_t to_bf16(float); uint16_t to_fp16(float);
struct Launch { dim3 grid; int threads; size_t smem; void (*entry)(const void*, unsigned char*); const void* params; };
const char* run(const Launch&);  // nullptr, or the diagnosis
}  // namespace rt

SIMT_DEVICE int thread_id() { return rt::cur->tid; }
SIMT_DEVICE int lane_id() { return rt::cur->lane; }
SIMT_DEVICE int warp_id() { return rt::cur->warp; }
SIMT_DEVICE dim3 block_idx() { return rt::cur->block; }
SIMT_DEVICE dim3 grid_dim() { return rt::cur->grid; }

SIMT_DEVICE void sync_block(SIMT_AT) { rt::barrier(0, -1, true, true, SIMT_SITE); }
SIMT_DEVICE void sync_warp(uint32_t mask = 0xffffffffu, SIMT_AT) { rt::warp_sync(mask, SIMT_SITE); }
SIMT_DEVICE void bar_sync(int id, int n, SIMT_AT) { rt::barrier(id, n, true, false, SIMT_SITE); }
SIMT_DEVICE void bar_arrive(int id, int n, SIMT_AT) { rt::barrier(id, n, false, false, SIMT_SITE); }

namespace rt {
template <class T> struct ShflArgs { T v; int src; T out; };
template <class T> void shfl_op(void** a, uint32_t mask, Site) {
  for (int l = 0; l < 32; l++) if (mask >> l & 1) {
    auto* s = (ShflArgs<T>*)a[l];
    int src = s->src & 31;
    s->out = (mask >> src & 1) ? ((ShflArgs<T>*)a[src])->v : ((ShflArgs<T>*)a[l])->v;
  }
}
template <class T> T shfl_from(T v, int src, uint32_t mask, Site at) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shfl moves 32- or 64-bit values");
  ShflArgs<T> a{v, src, v};
  warp_collective(mask, &shfl_op<T>, &a, "shfl", at);
  return a.out;
}
struct VoteArgs { uint32_t v, out; };
inline void ballot_op(void** a, uint32_t mask, Site) {
  uint32_t b = 0;
  for (int l = 0; l < 32; l++) if (mask >> l & 1 && ((VoteArgs*)a[l])->v) b |= 1u << l;
  for (int l = 0; l < 32; l++) if (mask >> l & 1) ((VoteArgs*)a[l])->out = b;
}
inline void redux_add_op(void** a, uint32_t mask, Site) {
  uint32_t b = 0;
  for (int l = 0; l < 32; l++) if (mask >> l & 1) b += ((VoteArgs*)a[l])->v;
  for (int l = 0; l < 32; l++) if (mask >> l & 1) ((VoteArgs*)a[l])->out = b;
}
}  // namespace rt
template <class T> T shfl_xor(T v, int m, uint32_t mask = 0xffffffffu, SIMT_AT) { return rt::shfl_from(v, lane_id() ^ m, mask, SIMT_SITE); }
template <class T> T shfl(T v, int src, uint32_t mask = 0xffffffffu, SIMT_AT) { return rt::shfl_from(v, src, mask, SIMT_SITE); }
template <class T> T shfl_down(T v, int d, uint32_t mask = 0xffffffffu, SIMT_AT) { int s = lane_id() + d; return rt::shfl_from(v, s < 32 ? s : lane_id(), mask, SIMT_SITE); }
SIMT_DEVICE uint32_t ballot(bool p, uint32_t mask = 0xffffffffu, SIMT_AT) { rt::VoteArgs a{p, 0}; rt::warp_collective(mask, rt::ballot_op, &a, "ballot", SIMT_SITE); return a.out; }
SIMT_DEVICE uint32_t redux_add(uint32_t v, uint32_t mask = 0xffffffffu, SIMT_AT) { rt::VoteArgs a{v, 0}; rt::warp_collective(mask, rt::redux_add_op, &a, "redux", SIMT_SITE); return a.out; }
SIMT_DEVICE bool elect_one(SIMT_AT) { rt::VoteArgs a{1, 0}; rt::warp_collective(0xffffffffu, rt::ballot_op, &a, "elect", SIMT_SITE); return lane_id() == 0; }

SIMT_DEVICE float exp2_approx(float x) { return exp2f(x); }
SIMT_DEVICE float log2_approx(float x) { return log2f(x); }
SIMT_DEVICE float rcp_approx(float x) { return 1.f / x; }
template <class T> uint32_t pack2(float lo, float hi);
template <> inline uint32_t pack2<bf16>(float lo, float hi) { return rt::to_bf16(lo) | (uint32_t)rt::to_bf16(hi) << 16; }
template <> inline uint32_t pack2<fp16>(float lo, float hi) { return rt::to_fp16(lo) | (uint32_t)rt::to_fp16(hi) << 16; }
SIMT_DEVICE uint32_t hmul2(uint32_t a, uint32_t b) {
  auto f = [](uint32_t x) { return rt::to_float(fp16{(uint16_t)x}); };
  return rt::to_fp16(f(a) * f(b)) | (uint32_t)rt::to_fp16(f(a >> 16) * f(b >> 16)) << 16;
}
SIMT_DEVICE uint32_t hfma2(uint32_t a, uint32_t b, uint32_t c) {  // product exact in float; the sum rounds twice (float, then fp16)
  auto f = [](uint32_t x) { return rt::to_float(fp16{(uint16_t)x}); };
  return rt::to_fp16(fmaf(f(a), f(b), f(c))) | (uint32_t)rt::to_fp16(fmaf(f(a >> 16), f(b >> 16), f(c >> 16))) << 16;
}
SIMT_DEVICE uint32_t hneg2(uint32_t a) { return a ^ 0x80008000u; }
SIMT_DEVICE float to_f32(fp16 v) { return rt::to_float(v); }
SIMT_DEVICE float to_f32(bf16 v) { return rt::to_float(v); }
SIMT_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t sel) {
  uint64_t v = (uint64_t)b << 32 | a; uint32_t r = 0;
  for (int i = 0; i < 4; i++) r |= (uint32_t)(v >> (8 * (sel >> (4 * i) & 7)) & 255) << (8 * i);
  return r;
}
SIMT_DEVICE uint32_t f32_bits(float v) { uint32_t b; memcpy(&b, &v, 4); return b; }
SIMT_DEVICE float bits_f32(uint32_t b) { float v; memcpy(&v, &b, 4); return v; }
SIMT_DEVICE uint32_t bit_reverse(uint32_t v) { uint32_t r = 0; for (int i = 0; i < 32; i++) r |= (v >> i & 1) << (31 - i); return r; }
SIMT_DEVICE float2 cos_sin_pi(float x) { const double a = 3.14159265358979323846 * x; return {(float)cos(a), (float)sin(a)}; }
SIMT_DEVICE void atomic_add(float* p, float v, SIMT_AT) { rt::atomic_add_f32(p, v, SIMT_SITE); }

SIMT_DEVICE uint32_t smem_addr(const void* p, SIMT_AT) { return rt::smem_addr(p, SIMT_SITE); }
SIMT_DEVICE uint4 load16(const void* p) { return *reinterpret_cast<const uint4*>(p); }
SIMT_DEVICE void store16(void* p, uint4 v) { *reinterpret_cast<uint4*>(p) = v; }
SIMT_DEVICE void cp_async16(void* dst, const void* src, bool pred = true, SIMT_AT) { rt::cp_async(dst, src, 16, pred, SIMT_SITE); }
SIMT_DEVICE void cp_async_commit() { rt::cp_commit(); }
template <int N> void cp_async_wait() { rt::cp_wait(N); }
SIMT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* p, SIMT_AT) { rt::ldmatrix(r, p, false, SIMT_SITE); }
SIMT_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* p, SIMT_AT) { rt::ldmatrix(r, p, true, SIMT_SITE); }
template <class T> struct is_bf16 { static constexpr bool value = false; };
template <> struct is_bf16<bf16> { static constexpr bool value = true; };
template <class T> void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_AT) { rt::mma16816(d, a, b0, b1, is_bf16<T>::value, SIMT_SITE); }

SIMT_DEVICE void mma_m16n8k16_zero_fp16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_AT) {
  d[0] = d[1] = d[2] = d[3] = 0.f; rt::mma16816(d, a, b0, b1, false, SIMT_SITE);
}
SIMT_DEVICE void mbar_init(uint64_t* b, uint32_t count, SIMT_AT) { rt::mbar_init(b, count, SIMT_SITE); }
SIMT_DEVICE void fence_mbar_init() {}
SIMT_DEVICE void fence_proxy_async() { rt::proxy_fence(); }
SIMT_DEVICE void mbar_arrive(uint64_t* b, SIMT_AT) { rt::mbar_arrive(b, 0, SIMT_SITE); }
SIMT_DEVICE void mbar_arrive_expect_tx(uint64_t* b, uint32_t bytes, SIMT_AT) { rt::mbar_arrive(b, bytes, SIMT_SITE); }
SIMT_DEVICE void mbar_wait(uint64_t* b, uint32_t parity, SIMT_AT) { rt::mbar_wait(b, parity, SIMT_SITE); }
SIMT_DEVICE void tma_load_2d(void* dst, const TensorMap* m, uint64_t* bar, int c0, int c1, SIMT_AT) { rt::tma_load(dst, m, bar, 2, {{c0, c1, 0, 0, 0}}, SIMT_SITE); }
SIMT_DEVICE void tma_load_3d(void* dst, const TensorMap* m, uint64_t* bar, int c0, int c1, int c2, SIMT_AT) { rt::tma_load(dst, m, bar, 3, {{c0, c1, c2, 0, 0}}, SIMT_SITE); }
SIMT_DEVICE void tma_load_4d(void* dst, const TensorMap* m, uint64_t* bar, int c0, int c1, int c2, int c3, SIMT_AT) { rt::tma_load(dst, m, bar, 4, {{c0, c1, c2, c3, 0}}, SIMT_SITE); }
SIMT_DEVICE void tma_load_5d(void* dst, const TensorMap* m, uint64_t* bar, int c0, int c1, int c2, int c3, int c4, SIMT_AT) { rt::tma_load(dst, m, bar, 5, {{c0, c1, c2, c3, c4}}, SIMT_SITE); }
SIMT_DEVICE void tma_store_2d(const TensorMap* m, const void* src, int c0, int c1, SIMT_AT) { rt::tma_store(m, src, 2, {{c0, c1, 0, 0, 0}}, SIMT_SITE); }
SIMT_DEVICE void tma_store_3d(const TensorMap* m, const void* src, int c0, int c1, int c2, SIMT_AT) { rt::tma_store(m, src, 3, {{c0, c1, c2, 0, 0}}, SIMT_SITE); }
SIMT_DEVICE void tma_store_4d(const TensorMap* m, const void* src, int c0, int c1, int c2, int c3, SIMT_AT) { rt::tma_store(m, src, 4, {{c0, c1, c2, c3, 0}}, SIMT_SITE); }
SIMT_DEVICE void tma_store_5d(const TensorMap* m, const void* src, int c0, int c1, int c2, int c3, int c4, SIMT_AT) { rt::tma_store(m, src, 5, {{c0, c1, c2, c3, c4}}, SIMT_SITE); }
SIMT_DEVICE void bulk_commit() { rt::bulk_commit(); }
template <int N> void bulk_wait_read() { rt::bulk_wait_read(N); }
SIMT_DEVICE void prefetch_tensor_map(const TensorMap*) {}
template <int N> void reg_dealloc(SIMT_AT) { static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg"); rt::set_max_reg(N, false, SIMT_SITE); }
template <int N> void reg_alloc(SIMT_AT) { static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg"); rt::set_max_reg(N, true, SIMT_SITE); }
SIMT_DEVICE void wgmma_fence(SIMT_AT) { rt::wgmma_fence(SIMT_SITE); }
SIMT_DEVICE void wgmma_commit(SIMT_AT) { rt::wgmma_commit(SIMT_SITE); }
template <int N, int M> void wgmma_wait(float (&)[M], SIMT_AT) { rt::wgmma_wait(N, SIMT_SITE); }
template <class T, int N, int TransB> void wgmma_ss(float (&d)[N / 2], uint64_t da, uint64_t db, bool accumulate, SIMT_AT) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256, "wgmma N");
  rt::wgmma_mma(d, N, nullptr, da, db, TransB != 0, accumulate, is_bf16<T>::value, SIMT_SITE);
}
template <class T, int N, int TransB> void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t db, bool accumulate, SIMT_AT) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256, "wgmma N");
  rt::wgmma_mma(d, N, a, 0, db, TransB != 0, accumulate, is_bf16<T>::value, SIMT_SITE);
}

template <class K> const char* launch(dim3 grid, const typename K::Params& p, void*) {
  rt::Launch l{grid, K::kThreads, sizeof(typename K::Smem),
               [](const void* q, unsigned char* s) { K::run(*static_cast<const typename K::Params*>(q), *reinterpret_cast<typename K::Smem*>(s)); }, &p};
  return rt::run(l);
}
inline const char* make_tensor_map_sw128(TensorMap* m, const void* base, int elem, int rank, const uint64_t* dims, const uint64_t* strides, const uint32_t* box) {
  // the encode-time constraints of cuTensorMapEncodeTiled
  if (rank < 2 || rank > 5) return "tensor map: rank";
  if ((uintptr_t)base % 16) return "tensor map: base not 16-byte aligned";
  if (box[0] * elem > 128) return "tensor map: inner box over 128 bytes with 128-byte swizzle";
  *m = TensorMap{(const unsigned char*)base, {1, 1, 1, 1, 1}, {(uint64_t)elem}, {1, 1, 1, 1, 1}, rank, elem, 0x7e45u};
  for (int i = 0; i < rank; i++) {
    if (i && (strides[i - 1] % 16 || strides[i - 1] >= (1ull << 40))) return "tensor map: stride not a multiple of 16 bytes or over 2^40";
    if (!box[i] || box[i] > 256) return "tensor map: box dimension not in 1..256";
    if (!dims[i] || dims[i] > (1ull << 32)) return "tensor map: dimension not in 1..2^32";
    m->dim[i] = dims[i]; m->box[i] = box[i]; if (i) m->stride[i] = strides[i - 1];
  }
  return nullptr;
}
}  // namespace simt
