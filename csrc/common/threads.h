// Parallel loops over torch's own thread team when torch is loaded, else over a private pool; per-thread scratch.
#pragma once
#include "common/runtime.h"

namespace tilewise {

Runtime make_runtime(void* stream);

void parallel_for(int64_t n, int64_t grain, RangeBody body, void* context);

template <class F>
void parallel_for(int64_t n, int64_t grain, const F& body) {
  auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
  parallel_for(n, grain, call, const_cast<void*>(static_cast<const void*>(&body)));
}

void* scratch(int slot, size_t bytes);

}  // namespace tilewise
