// Instances of the kernel of dbias.
#include "attention/cuda/bias.h"

#include "attention/cuda/launch.h"

namespace tilewise::attention {
namespace {

template <class T, class Engine>
const char* launch_bias(const BackwardParams& b, const Runtime& rt) {
  const int64_t* sizes = b.dbias_sizes;
  BiasArgs args = {
      {b, 0, rows_aligned(b), rt.fault},
      {sizes[0], sizes[1], ceil_div<int64_t>(sizes[2], Engine::kRows), ceil_div<int64_t>(sizes[3], Engine::kKeys)}};
  const int64_t blocks = args.tiles[0] * args.tiles[1] * args.tiles[2] * args.tiles[3];
  if (blocks == 0) return nullptr;
  if (blocks > 0x7fffffff) return "more than 2^31 - 1 tiles of dbias, expected fewer";
  return launch<BiasGradient<T, Engine>>(dim3(static_cast<unsigned>(blocks)), args, rt.stream);
}

}  // namespace

const char* bias_gradient(const BackwardParams& b, bool tensor_cores, const Runtime& rt) {
  const ForwardParams& p = b.forward;
  return select_dim(padded_dim(p), [&](auto dim) {
    constexpr int D = decltype(dim)::value;
    if (tensor_cores)
      return select_type16(p.type, [&](auto type) {
        using T = TypeOf<decltype(type)>;
        return launch_bias<T, TensorEngine<T, D>>(b, rt);
      });
    return select_any_type(p.type, [&](auto type) {
      using T = TypeOf<decltype(type)>;
      return launch_bias<T, AnyEngine<T, D>>(b, rt);
    });
  });
}

}  // namespace tilewise::attention
