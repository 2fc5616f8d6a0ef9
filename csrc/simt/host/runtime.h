// What the headers of host/ call: the emulator's side of every instruction. Implemented in emulator/.
#pragma once
#include "types.h"

namespace simt {

// Stands in for CUtensorMap, which has 128 opaque bytes: rank 2 to 5, 128-byte swizzle.
struct alignas(64) TensorMap {
  const unsigned char* base;
  uint64_t dim[5];
  uint64_t stride[5];  // bytes
  uint32_t box[5];
  int rank;
  int elem_bytes;
  uint32_t magic;
};

namespace rt {

constexpr uint32_t kTensorMapMagic = 0x7e45u;

struct Site {
  const char* file;
  int line;
};

struct Thread {
  int tid, lane, warp;
  dim3 block, grid, block_dim;
};
// The CUDA thread whose fiber runs now.
extern thread_local Thread* current;

[[noreturn]] void misaligned(const char* what, const void* p, int bytes, Site);

// ---- collectives.cpp ----
// `threads` -1: the whole block, whose threads must all come from the same source line.
void barrier(int id, int threads, bool wait, Site);
void warp_sync(uint32_t mask, Site);
// Runs `op` once, when every lane of `mask` has arrived; args[lane] is what that lane passed.
using CollectiveOp = void (*)(void** args, uint32_t mask, Site);
void warp_collective(uint32_t mask, CollectiveOp op, void* args, const char* name, Site);
[[noreturn]] void shuffle_source_missing(int lane, int source, uint32_t mask, Site);
void fence_device();

// ---- numbers.cpp ----
float fp16_to_f32(uint16_t);
uint16_t f32_to_fp16(float);
uint16_t f32_to_bf16(float);
// a * b + c in one rounding, for fp16 and bf16 bits
uint16_t fma_fp16(uint16_t a, uint16_t b, uint16_t c);
uint16_t fma_bf16(uint16_t a, uint16_t b, uint16_t c);

// ---- memory.cpp ----
uint32_t smem_addr(const void*, Site);
enum class Atomic { kAddF32, kAdd, kMaxS32, kMaxU32, kMinS32, kMinU32, kOr, kAnd, kExch, kCas };
uint32_t atomic32(void*, Atomic, uint32_t operand, uint32_t expected, Site);
void cp_async(void* dst, const void* src, int bytes, bool predicate, Site);
void cp_async_commit();
void cp_async_wait(int newest_pending);

// ---- tensor_cores.cpp ----
void ldmatrix(uint32_t* r, int tiles, const void* row, bool transposed, Site);
void stmatrix(const uint32_t* r, int tiles, void* row, bool transposed, Site);
void mma_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool is_bf16, Site);
void mma_m16n8k16_acc16(uint32_t* d, const uint32_t* a, uint32_t b0, uint32_t b1, Site);
void mma_m16n8k8_tf32(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Site);
void mma_s8(int32_t* d, const uint32_t* a, const uint32_t* b, int k, Site);
void mma_sp_m16n8k32(float* d, const uint32_t* a, const uint32_t* b, uint32_t metadata, int selector, bool is_bf16,
                     Site);

// ---- mbarrier_tma.cpp ----
struct Coord {
  int c[5];
};
void mbar_init(uint64_t*, uint32_t count, Site);
void mbar_arrive(uint64_t*, int64_t tx_bytes, Site);
void mbar_wait(uint64_t*, uint32_t parity, Site);
void fence_proxy_async();
void bulk_load(void* dst, const void* src, uint32_t bytes, uint64_t* bar, Site);
void bulk_store(void* dst, const void* src, uint32_t bytes, Site);
void tma_load(void* dst, const TensorMap*, uint64_t* bar, int rank, Coord, Site);
void tma_store(const TensorMap*, const void* src, int rank, Coord, Site);
void bulk_commit();
void bulk_wait_read(int newest_pending);

// ---- wgmma.cpp ----
struct WgmmaShape {
  int n;
  bool a_in_registers, trans_a, trans_b, is_bf16;
};
void set_max_reg(int registers, bool grow, Site);
void wgmma_fence(Site);
void wgmma(WgmmaShape, float* d, const uint32_t* a, uint64_t desc_a, uint64_t desc_b, bool accumulate, Site);
void wgmma_commit(Site);
void wgmma_wait(int newest_pending, Site);

// ---- scheduler.cpp ----
struct Launch {
  dim3 grid;
  int threads;
  size_t smem_bytes;
  void (*entry)(const void* params, unsigned char* smem);
  const void* params;
};
const char* run(const Launch&);  // nullptr, or the diagnosis (valid until this host thread's next launch)

}  // namespace rt
}  // namespace simt
