// CPU kernels of the family that have a version for AMX tiles (rules: common/isa.h).
#include "sparse/cpu/nm_tiles.h"

namespace tilewise {
namespace {

// run(an element, its products) if tiles serve the call, else the vectors.
template <class Params, class Run>
const char* on_tiles(const Params& p, const Runtime& rt, bool serves, KernelFn<Params> on_vectors, const Run& run) {
  if (serves && p.type == Type::bf16) return run(Bf16(), PartProducts<1>());
  if (serves && p.type == Type::f16 && rt.fp16_tiles) return run(Fp16(), HalfProducts<1>());
  return on_vectors(p, rt);
}

const char* nm_forward_on_tiles(const NmForwardParams& p, const Runtime& rt) {
  return on_tiles(p, rt, p.in > 0 && p.rows > kLookUpRows, &nm_forward, [&](auto element, auto products) {
    return nm_forward_tiles<decltype(element), decltype(products)>(p, rt);
  });
}
const char* nm_grad_input_on_tiles(const NmGradInputParams& p, const Runtime& rt) {
  return on_tiles(p, rt, p.out > 0, &nm_grad_input, [&](auto element, auto products) {
    return nm_grad_input_tiles<decltype(element), decltype(products)>(p, rt);
  });
}
const char* nm_grad_values_on_tiles(const NmGradValuesParams& p, const Runtime& rt) {
  return on_tiles(p, rt, p.rows > 0, &nm_grad_values, [&](auto element, auto products) {
    return multiply_in_blocks<decltype(products)>(rt, GradValuesTiles<decltype(element)>{p});
  });
}

}  // namespace
}  // namespace tilewise

extern "C" const tilewise::sparse::Kernels TILEWISE_ISA_TABLE(sparse) = {
    &tilewise::nm_forward_on_tiles,
    &tilewise::nm_grad_input_on_tiles,
    &tilewise::nm_grad_values_on_tiles,
};
