// The family's CUDA table: compiled by nvcc for GPUs and by g++ for the emulator.
#include "speculative/cuda/tree.h"
#include "speculative/params.h"

namespace tilewise::speculative {
namespace {

const char* tree_finalize(const TreeFinalizeParams& p, const Runtime& rt) {
  return simt::launch<TreeFinalize>(dim3(p.batch), {p, rt.fault}, rt.stream);
}

}  // namespace
}  // namespace tilewise::speculative

extern "C" __attribute__((visibility("default"))) const tilewise::speculative::Kernels tilewise_speculative_cuda = {
    &tilewise::speculative::tree_finalize, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
};
