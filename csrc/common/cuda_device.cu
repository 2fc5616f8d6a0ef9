#include <cuda_runtime.h>

#include <map>
#include <mutex>

#include "common/cuda_device.h"

namespace tilewise::cuda {

bool built() {
  return true;
}

std::vector<CudaDevice> devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // no driver or no device: leave no sticky error behind
    return {};
  }
  std::vector<CudaDevice> list;
  for (int i = 0; i < count; i++) {
    cudaDeviceProp p;
    if (cudaGetDeviceProperties(&p, i) != cudaSuccess) continue;
    list.push_back({p.name, p.major * 10 + p.minor, p.totalGlobalMem});
  }
  return list;
}

int exchange_device(int index) {
  int current = -1;
  if (cudaGetDevice(&current) != cudaSuccess || current == index) return -1;
  return cudaSetDevice(index) == cudaSuccess ? current : -1;
}

uint32_t* fault_word(int index) {
  static std::mutex mutex;
  static std::map<int, uint32_t*> words;
  const std::lock_guard<std::mutex> lock(mutex);
  auto [it, fresh] = words.try_emplace(index, nullptr);
  if (fresh) {
    void* word = nullptr;  // with unified addressing the host pointer is the device's pointer too
    if (cudaHostAlloc(&word, sizeof(uint32_t), cudaHostAllocMapped | cudaHostAllocPortable) == cudaSuccess) {
      it->second = static_cast<uint32_t*>(word);
      *it->second = 0;
    }
  }
  return it->second;
}

}  // namespace tilewise::cuda
