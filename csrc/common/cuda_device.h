// The few facts about CUDA devices that the core needs; a CPU-only build links the stand-ins of cuda_device_none.cpp.
#pragma once
#include <vector>

#include "tilewise/runtime.h"

namespace tilewise::cuda {

bool built();
std::vector<CudaDevice> devices();
// Makes `index` the current device and returns the one that was current, or -1 if nothing changed.
int exchange_device(int index);
// One word of host memory per device that kernels can write and the host reads without a synchronisation; null if the
// device cannot map host memory.
uint32_t* fault_word(int index);

}  // namespace tilewise::cuda
