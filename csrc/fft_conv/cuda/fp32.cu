// Kernels in fp32: filter spectra for every type, and the convolution of fp32 rows.
#include "fft_conv/cuda/conv32.h"
#include "fft_conv/cuda/instances.h"

namespace tilewise::fft_conv {

namespace {

// The smallest of three capacities that holds n points. All capacities of a kernel have the same parameters.
template <template <int> class K, bool Built, class... Args>
const char* launch_sized(int n, dim3 grid, void* stream, const Args&... args) {
  using Small = K<1024>;
  using Large = K<16384>;
  constexpr bool kOthers = Built && kEverySize;
  if (n <= 1024 && kOthers) return launch_if_built<Small, kOthers>(grid, {args...}, stream);
  if (n <= 4096) return launch_if_built<K<4096>, Built>(grid, {args...}, stream);
  return launch_if_built<Large, kOthers>(grid, {args...}, stream);
}

}  // namespace

const char* launch_conv32(int n, bool conjugate, dim3 grid, const ConvParams<float>& p, void* stream) {
  return launch_sized<Conv32, kEverySize>(n, grid, stream, p, n, conjugate);
}
const char* launch_filter_grad32(int n, dim3 grid, const FilterGradParams<float>& p, void* stream) {
  return launch_sized<FilterGrad32, kEverySize>(n, grid, stream, p, n);
}
const char* launch_prepare(const PrepareParams& p, void* stream) {
  const int table_blocks = p.tables ? Prepare<1024>::kTableBlocks : 0;
  return launch_sized<Prepare, true>(p.n, dim3(p.heads + table_blocks), stream, p);
}

}  // namespace tilewise::fft_conv
