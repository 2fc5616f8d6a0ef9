// The small kernels of the options.
#include "attention/cuda/options.h"

#include "attention/cuda/launch.h"

namespace tilewise::attention {

const char* sink_gradient(const BackwardParams& b, const Runtime& rt) {
  return launch<SinkGradient>(dim3(static_cast<unsigned>(b.forward.q_heads)), {b, 1, rt.fault}, rt.stream);
}

const char* pack_mask(const PackMaskParams& p, const Runtime& rt) {
  const int64_t words = ceil_div<int64_t>(p.keys, 32), strips = ceil_div<int64_t>(words, kWarp);
  const int64_t blocks = ceil_div<int64_t>(p.sizes[0] * p.sizes[1] * p.sizes[2] * strips, PackMask::kWarps);
  if (blocks > 0x7fffffff) return "a mask of more than 2^43 keys, expected fewer";
  return launch<PackMask>(dim3(static_cast<unsigned>(blocks)), {p, words, strips}, rt.stream);
}

}  // namespace tilewise::attention
