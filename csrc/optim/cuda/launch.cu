// The family's CUDA table: compiled by nvcc for GPUs and by g++ for the emulator.
#include "optim/cuda/adamw.h"
#include "optim/cuda/quantize.h"
#include "optim/params.h"

namespace tilewise::optim {
namespace {

bool aligned16(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

bool all_aligned(const AdamWTensor& t) {
  return aligned16(t.param) && aligned16(t.grad) && aligned16(t.exp_avg) && aligned16(t.exp_avg_sq);
}

// Steps the tensors of one pair of dtypes, kMaxTensors to a launch.
template <class P, class G>
const char* step_tensors(const AdamWParams& p, Float param_type, Float grad_type, void* stream) {
  using Kernel = AdamWStep<P, G>;
  typename Kernel::Params q = {};
  q.k = {p.beta1, p.beta2, p.grad_weight, p.square_weight, p.decay, p.eps};
  int chunks = 0;
  const auto flush = [&]() -> const char* {
    const char* why = q.count ? simt::launch<Kernel>(dim3(chunks), q, stream) : nullptr;
    q.count = chunks = 0;
    return why;
  };
  for (int64_t i = 0; i < p.count; i++) {
    const AdamWTensor& t = p.tensors[i];
    if (t.param_type != param_type || t.grad_type != grad_type) continue;
    q.tensors[q.count++] = {t.param, t.grad,      t.exp_avg,         t.exp_avg_sq, t.scales,
                            t.n,     t.step_size, t.inv_correction2, chunks,       all_aligned(t)};
    chunks += static_cast<int>(simt::ceil_div<int64_t>(t.n, Kernel::kChunkElements));
    if (q.count == kMaxTensors)
      if (const char* why = flush()) return why;
  }
  return flush();
}

using StepTensors = const char* (*)(const AdamWParams&, Float param_type, Float grad_type, void* stream);

#ifdef TILEWISE_FEW_INSTANCES
constexpr StepTensors kSteps[3][3] = {{&step_tensors<float, float>}, {nullptr, &step_tensors<simt::bf16, simt::bf16>}};
#else
constexpr StepTensors kSteps[3][3] = {
    // [param type][grad type]
    {&step_tensors<float, float>, &step_tensors<float, simt::bf16>, &step_tensors<float, simt::fp16>},
    {&step_tensors<simt::bf16, float>, &step_tensors<simt::bf16, simt::bf16>, &step_tensors<simt::bf16, simt::fp16>},
    {&step_tensors<simt::fp16, float>, &step_tensors<simt::fp16, simt::bf16>, &step_tensors<simt::fp16, simt::fp16>},
};
#endif

const char* adamw_step(const AdamWParams& p, const Runtime& rt) {
  for (int param_type = 0; param_type < 3; param_type++) {
    for (int grad_type = 0; grad_type < 3; grad_type++) {
      if (!kSteps[param_type][grad_type]) continue;
      const char* why = kSteps[param_type][grad_type](p, Float(param_type), Float(grad_type), rt.stream);
      if (why) return why;
    }
  }
  return nullptr;
}

template <template <class> class Kernel, class Codec>
const char* launch_codec(const CodecParams& p, const Runtime& rt) {
  const int64_t blocks = simt::ceil_div<int64_t>(p.n, Codec::kElements);
  const auto grid = static_cast<unsigned>(simt::ceil_div<int64_t>(blocks * Codec::kLanes, kCodecThreads));
  return simt::launch<Kernel<Codec>>(dim3(grid), {p, aligned16(p.values)}, rt.stream);
}
template <template <class> class Kernel>
const char* run_codec(const CodecParams& p, const Runtime& rt) {
  return p.bits == 4 ? launch_codec<Kernel, Codec4>(p, rt) : launch_codec<Kernel, Codec8>(p, rt);
}

}  // namespace
}  // namespace tilewise::optim

extern "C" __attribute__((visibility("default"))) const tilewise::optim::Kernels tilewise_optim_cuda = {
    &tilewise::optim::adamw_step,
    &tilewise::optim::run_codec<tilewise::optim::Quantize>,
    &tilewise::optim::run_codec<tilewise::optim::Dequantize>,
};
