// What a kernel may ask of the machine it runs on. Plain C: the per-ISA objects are built without the C++ library.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace tilewise {

using RangeBody = void (*)(int64_t begin, int64_t end, void* context);  // must not throw

struct Runtime {
  // Splits [0, n) into ranges of at least `grain` and runs them on the thread team; small jobs run inline.
  void (*parallel_for)(int64_t n, int64_t grain, RangeBody body, void* context);
  int (*num_threads)();
  // This thread's scratch memory: 64-byte aligned, on huge pages when large, kept for later calls. Each slot is a
  // buffer of its own; a later, larger request for the same slot invalidates the earlier pointer. A range body runs on
  // the calling thread too, so it uses another slot than its caller. Null when memory is exhausted.
  void* (*scratch)(int slot, size_t bytes);
  void* stream;  // CUDA stream, or null
  // Where a CUDA kernel that meets a bad index reports it (a Fault): memory that the host reads at the next call on the
  // same device, so nothing waits. The kernel itself skips or clamps the index. Null on CPU, where the host validates
  // indices before they are followed.
  uint32_t* fault;
  bool fp16_tiles = false;  // whether AMX tiles may multiply fp16 (tdpfp16ps)
};

// What a device-side index check can find; the next call on the device raises with its text.
enum Fault : uint32_t {
  kNoFault,
  kBadCuSeqlens,
  kBadBlockTable,
  kBadSeqLen,
  kBadTreeParent,
  kBadTreeNodeCount,
  kBadTreePath,
  kBadSparseIndex,
  kFaultCount,
};

constexpr int kScratchSlots = 8;
inline constexpr const char* kOutOfMemory = "out of memory for scratch space";

// A kernel returns null, or why it could not run.
template <class Params>
using KernelFn = const char* (*)(const Params&, const Runtime&);

}  // namespace tilewise
