// Which kernel serves which size. One .cu file per element type and kernel instantiates these templates, so that they
// compile side by side.
#pragma once
#include "fft_conv/cuda/kernel_params.h"
#include "fft_conv/cuda/prepare.h"

namespace tilewise::fft_conv {

// Mutation tests compile the family many times and need two sizes of one type only.
#ifdef TILEWISE_FEW_INSTANCES
constexpr bool kEverySize = false;
#else
constexpr bool kEverySize = true;
#endif
template <class T>
constexpr bool kBuilt = kEverySize || is_same_v<T, fp16>;

constexpr const char* kNotBuilt = "this build leaves out the kernel";

template <class K, bool Built>
const char* launch_if_built(dim3 grid, const typename K::Params& p, void* stream) {
  if constexpr (Built) {
    return launch<K>(grid, p, stream);
  } else {
    return kNotBuilt;
  }
}

inline Factors factors_of(int n) {
  switch (n) {
    case 256: return {16, 16};
    case 512: return {32, 16};
    case 1024: return {32, 32};
    case 2048: return {64, 32};
    default: return {n / 256, 0};
  }
}

// Partial results of the filter gradient per group of rows: one per warp, or one per 16 values of k1 of three factors.
inline int partials_per_group(int n) {
  return n <= 2048 ? 4 : n / 4096;
}

// Grid (heads, groups of rows).
template <class T>
const char* launch_conv(int n, dim3 grid, const ConvParams<T>& p, void* stream);
template <class T>
const char* launch_filter_grad(int n, dim3 grid, const FilterGradParams<T>& p, void* stream);

const char* launch_conv32(int n, bool conjugate, dim3 grid, const ConvParams<float>& p, void* stream);
const char* launch_filter_grad32(int n, dim3 grid, const FilterGradParams<float>& p, void* stream);
const char* launch_prepare(const PrepareParams& p, void* stream);

}  // namespace tilewise::fft_conv
