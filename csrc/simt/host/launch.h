// Launches and device queries: twin of device/launch.h. Launches are synchronous and may come from several host
// threads.
#pragma once
#include <stdlib.h>
#include <string.h>

#include "runtime.h"

namespace simt {

// SIMT_ARCH: a GPU of another architecture, where a launcher chooses kernels by it.
inline int device_arch() {
  const char* arch = getenv("SIMT_ARCH");
  return arch ? atoi(arch) : kSm90a;
}
inline int sm_count() {
  return 4;
}

template <class K>
bool supported() {
  return arch_runs(device_arch(), K::kMinArch);
}

template <class K>
const char* launch(dim3 grid, const typename K::Params& params, void* /*stream*/, size_t extra_smem_bytes = 0) {
  static_assert(K::kThreads % kWarp == 0 && K::kThreads <= 1024, "whole warps, at most 1024 threads");
  rt::Launch l;
  l.grid = grid;
  l.threads = K::kThreads;
  l.smem_bytes = sizeof(typename K::Smem) + extra_smem_bytes;
  l.params = &params;
  l.entry = [](const void* p, unsigned char* smem) {
    K::run(*static_cast<const typename K::Params*>(p), *reinterpret_cast<typename K::Smem*>(smem));
  };
  return rt::run(l);
}

inline const char* memset_async(void* p, int value, size_t bytes, void* /*stream*/) {
  memset(p, value, bytes);
  return nullptr;
}

}  // namespace simt
