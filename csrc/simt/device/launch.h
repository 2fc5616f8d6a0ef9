// The kernel entry point, launches and device queries. Functions return nullptr or an error message.
//
// A kernel is struct K { struct Params; struct Smem; static constexpr int kThreads, kMinArch;
//                        static void run(const Params&, Smem&); }, run being SIMT_DEVICE.
// kMinBlocks (optional) is the number of blocks an SM must hold, which fixes the register budget; 0 leaves it to the
// compiler. The default is 1, because without a budget ptxas ignores setmaxnreg.
#pragma once
#include <atomic>

namespace simt {

namespace detail {

template <class K, class = void>
inline constexpr int min_blocks = 1;
template <class K>
inline constexpr int min_blocks<K, decltype(static_cast<void>(K::kMinBlocks))> = K::kMinBlocks;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr int kCompiledArch = kSm90a;
#elif defined(__CUDA_ARCH__)
inline constexpr int kCompiledArch = __CUDA_ARCH__;
#else
inline constexpr int kCompiledArch = 0;
#endif
// Plain sm_90 code lacks the sm_90a instructions that arch_runs grants to the device as a whole.
template <int MinArch>
inline constexpr bool compiled_for = MinArch == kSm90a ? kCompiledArch == kSm90a : kCompiledArch >= MinArch;

// Below K's architecture the body is empty: launch() refuses to run it there.
template <class K>
__global__ void __launch_bounds__(K::kThreads, min_blocks<K>)
    kernel_entry(const __grid_constant__ typename K::Params params) {
  extern __shared__ __align__(1024) unsigned char dynamic_smem[];
  if constexpr (compiled_for<K::kMinArch>) K::run(params, *reinterpret_cast<typename K::Smem*>(dynamic_smem));
}

constexpr int kMaxDevices = 64;

inline int current_device() {
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess && device < kMaxDevices ? device : 0;
}

// A device attribute, asked of the driver once per device.
template <cudaDeviceAttr Attribute>
inline int device_attribute(int device) {
  static std::atomic<int> known[kMaxDevices];  // value + 1
  int value = known[device].load(std::memory_order_relaxed);
  if (value) return value - 1;
  if (cudaDeviceGetAttribute(&value, Attribute, device) != cudaSuccess) return 0;
  known[device].store(value + 1, std::memory_order_relaxed);
  return value;
}

inline int device_arch(int device) {
  return 100 * device_attribute<cudaDevAttrComputeCapabilityMajor>(device) +
         10 * device_attribute<cudaDevAttrComputeCapabilityMinor>(device);
}

// Once per kernel and device: grants all the shared memory the device can give. It does not reserve it: occupancy
// follows from what each launch asks for.
template <class K>
inline cudaError_t allow_shared_memory(int device) {
  static std::atomic<uint64_t> done{0};
  const uint64_t bit = uint64_t{1} << device;
  if (done.load(std::memory_order_relaxed) & bit) return cudaSuccess;
  const int bytes = device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(device);
  const cudaError_t e = cudaFuncSetAttribute(kernel_entry<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (e == cudaSuccess) done.fetch_or(bit, std::memory_order_relaxed);
  return e;
}

inline const char* message(cudaError_t e) {
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

}  // namespace detail

// 100 major + 10 minor of the current device: 800, 890, 900 ...; the emulator says kSm90a and runs everything.
inline int device_arch() {
  return detail::device_arch(detail::current_device());
}
inline int sm_count() {
  return detail::device_attribute<cudaDevAttrMultiProcessorCount>(detail::current_device());
}

template <class K>
inline bool supported() {
  return arch_runs(device_arch(), K::kMinArch);
}

template <class K>
inline const char* launch(dim3 grid, const typename K::Params& params, void* stream, size_t extra_smem_bytes = 0) {
  static_assert(K::kThreads % kWarp == 0 && K::kThreads <= 1024, "whole warps, at most 1024 threads");
  const int device = detail::current_device();
  if (!arch_runs(detail::device_arch(device), K::kMinArch)) return "this device lacks the kernel's architecture";
  const cudaError_t e = detail::allow_shared_memory<K>(device);
  if (e != cudaSuccess) return detail::message(e);
  void* args[] = {const_cast<typename K::Params*>(&params)};
  const void* entry = reinterpret_cast<const void*>(&detail::kernel_entry<K>);
  return detail::message(cudaLaunchKernel(entry, grid, dim3(K::kThreads), args,
                                          sizeof(typename K::Smem) + extra_smem_bytes,
                                          static_cast<cudaStream_t>(stream)));
}

inline const char* memset_async(void* p, int value, size_t bytes, void* stream) {
  return detail::message(cudaMemsetAsync(p, value, bytes, static_cast<cudaStream_t>(stream)));
}

}  // namespace simt
