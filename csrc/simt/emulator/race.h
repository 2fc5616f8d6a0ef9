// The race checker: vector clocks per CUDA thread, a record per byte of shared and registered global memory.
//
// It sees every access of kernels compiled with -fsanitize=thread (race_hooks.cpp) and is told here what the emulated
// instructions do. Barriers, sync_warp and mbarriers order threads; shuffles and mma do not. Between blocks only
// fence_device and atomics do. All functions but enabled() do nothing while no block is being checked.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <string>
#include <vector>

#include "../simt.h"

namespace simt {
namespace race {

bool enabled();  // the kernels in this library are instrumented

void begin_launch(int threads, size_t smem_bytes);
std::string end_launch();  // the report, empty if nothing was found
void begin_block(unsigned index, unsigned char* smem);
void end_block();

// ---- accesses, by the thread `tid` ----
void read(int tid, const void*, size_t bytes, rt::Site);
void write(int tid, const void*, size_t bytes, rt::Site);
void atomic(int tid, const void*, rt::Site);
// An asynchronous operation that the same thread waits for: cp.async (write), wgmma and TMA stores (read).
void begin_async_write(int tid, const void*, size_t bytes, rt::Site);
void end_async_write(int tid, const void*, size_t bytes, rt::Site);
void begin_async_read(int tid, const void*, size_t bytes, rt::Site);
void end_async_read(int tid, const void*, size_t bytes, rt::Site);
// An asynchronous write that whoever waits for the mbarrier may read.
uint32_t begin_bulk_load(int tid, const void*, size_t bytes, rt::Site);
void end_bulk_load(uint32_t token, const uint64_t* bar, const void*, size_t bytes);

// ---- order ----
void join(const std::vector<int>& arrivals, const std::vector<int>& waiters);
void mbar_init(const uint64_t* bar);
void mbar_use(int tid, const uint64_t* bar, rt::Site);  // its initialisation must be visible
void mbar_arrive(int tid, const uint64_t* bar);
void mbar_wait(int tid, const uint64_t* bar);
void mbar_phase_complete(const uint64_t* bar);
void fence_proxy_async(int tid);
void fence_device(int tid);

}  // namespace race
}  // namespace simt
