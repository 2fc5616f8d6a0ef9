// The step kernels' launchers, by the parameters' dtype; one source file per form of the moments.
#pragma once
#include "optim/cuda/tensors.h"

namespace tilewise::optim {

using StepLaunch = const char* (*)(const TensorTable&, unsigned thread_blocks, void* stream);

StepLaunch full_step_of(Float param);  // 32 bits, or none; also factored
StepLaunch bits4_step_of(Float param, bool is_structured);
StepLaunch bits8_step_of(Float param, bool is_structured);
const char* tile_statistics(const TensorTable&, unsigned thread_blocks, void* stream);
const char* combine_statistics(const TensorTable&, unsigned thread_blocks, void* stream);
const char* invert_mean(const TensorTable&, unsigned thread_blocks, void* stream);
const char* publish_scales(const TensorTable&, unsigned thread_blocks, void* stream);
int64_t combine_units(const StepTensor&);
int64_t publish_units(const StepTensor&);

template <class Kernel>
const char* launch_table(const TensorTable& table, unsigned thread_blocks, void* stream) {
  return simt::launch<Kernel>(dim3(thread_blocks), table, stream);
}

// Step<P> of every type of parameters.
template <template <class> class Step>
StepLaunch step_of(Float param) {
  constexpr StepLaunch steps[] = {&launch_table<Step<float>>, &launch_table<Step<simt::bf16>>,
                                  &launch_table<Step<simt::fp16>>};
  return steps[static_cast<int>(param)];
}

}  // namespace tilewise::optim
