// Transforms of the CPU kernels, built once per size and kept.
#pragma once
#include "fft_conv/cpu/plan.h"

namespace tilewise::fft_conv {

// Thread-safe; the plan lives as long as the process. Null when memory is exhausted.
const Plan* plan_for(int64_t length, int lanes);

}  // namespace tilewise::fft_conv
