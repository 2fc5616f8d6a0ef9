#pragma once
#include "fft_conv/cuda/filter_grad.h"
#include "fft_conv/cuda/instances.h"

namespace tilewise::fft_conv {

// With three factors, blocks share a row: one per 16 values of k1.
template <class T>
const char* launch_filter_grad(int n, dim3 grid, const FilterGradParams<T>& p, void* stream) {
  constexpr bool kFew = kBuilt<T>, kAll = kEverySize;
  switch (n) {
    case 256: return launch_if_built<FilterGrad2<T, 16, 16>, kFew>(grid, p, stream);
    case 512: return launch_if_built<FilterGrad2<T, 32, 16>, kAll>(grid, p, stream);
    case 1024: return launch_if_built<FilterGrad2<T, 32, 32>, kAll>(grid, p, stream);
    case 2048: return launch_if_built<FilterGrad2<T, 64, 32>, kAll>(grid, p, stream);
    case 4096: return launch_if_built<FilterGrad3<T, 16>, kFew>(grid, p, stream);
    case 8192: return launch_if_built<FilterGrad3<T, 32>, kAll>(dim3(2 * grid.x, grid.y), p, stream);
    default: return launch_if_built<FilterGrad3<T, 64>, kAll>(dim3(4 * grid.x, grid.y), p, stream);
  }
}

}  // namespace tilewise::fft_conv
