#pragma once
#include "fft_conv/cuda/conv.h"
#include "fft_conv/cuda/instances.h"

namespace tilewise::fft_conv {

template <class T>
const char* launch_conv(int n, dim3 grid, const ConvParams<T>& p, void* stream) {
  constexpr bool kFew = kBuilt<T>, kAll = kEverySize;
  switch (n) {
    case 256: return launch_if_built<Conv2<T, 16, 16>, kFew>(grid, p, stream);
    case 512: return launch_if_built<Conv2<T, 32, 16>, kAll>(grid, p, stream);
    case 1024: return launch_if_built<Conv2<T, 32, 32>, kAll>(grid, p, stream);
    case 2048: return launch_if_built<Conv2<T, 64, 32>, kAll>(grid, p, stream);
    case 4096: return launch_if_built<Conv3<T, 16, 4, true>, kFew>(grid, p, stream);
    case 8192: return launch_if_built<Conv3<T, 32, 8, true>, kAll>(grid, p, stream);
    default: return launch_if_built<Conv3<T, 64, 8, false>, kAll>(grid, p, stream);
  }
}

}  // namespace tilewise::fft_conv
