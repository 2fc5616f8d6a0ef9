// From an operation and a device to the kernels that serve it.
#pragma once
#include "common/runtime.h"
#include "tilewise/error.h"
#include "tilewise/tensor.h"

namespace tilewise {

enum class Isa : int { generic, avx2, avx512 };
constexpr int kIsaCount = 3;

// A family's kernels on every machine. `Kernels` is the family's struct of KernelFn pointers (its params.h); a null
// pointer in it means that this machine has no such kernel.
template <class Kernels>
struct KernelSet {
  const Kernels* cpu[kIsaCount];  // by Isa; null where not built
  const Kernels* cuda;            // null in a CPU-only build
  const char* cuda_symbol;        // the same table's name in an emulator library
};

Isa current_isa();

// With an emulator library loaded, CPU tensors run the CUDA kernels compiled for the host.
// `path` null or empty unloads it. Throws Error (runtime) if the library cannot be loaded.
void emulate(const char* path);
bool emulating();
// Whether the host may read the tensors' memory and validate indices in it: on CPU, but not when CPU tensors stand in
// for CUDA tensors under emulation.
bool host_checks_indices(Device device);
const void* emulated_table(const char* symbol);
// Names a buffer for the emulator's race and bounds checks, until the next forget_buffers().
void note_buffer(const void* data, size_t bytes, const char* name);
void forget_buffers();

// Makes the tensors' device current for the duration of a call.
class DeviceGuard {
 public:
  explicit DeviceGuard(Device device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
};

[[noreturn]] void raise_missing(const char* operation, Device device);
[[noreturn]] void raise_failed(const char* operation, const char* why);
// Raises what an earlier kernel on the device reported (runtime.h, Fault), and gives the call its runtime.
Runtime runtime_for(Device device, void* stream);

template <class Kernels>
const Kernels* select_kernels(const KernelSet<Kernels>& set, Device device) {
  if (device.type == DeviceType::cuda) return set.cuda;
  if (device.type != DeviceType::cpu) return nullptr;
  if (emulating()) return static_cast<const Kernels*>(emulated_table(set.cuda_symbol));
  for (int level = static_cast<int>(current_isa()); level >= 0; level--)
    if (set.cpu[level]) return set.cpu[level];
  return nullptr;
}

// Runs one kernel of a family on the tensors' device: run_kernel(op, kAttention, q.device, &Kernels::forward, p, s).
template <class Kernels, class Params>
void run_kernel(const char* operation, const KernelSet<Kernels>& set, Device device, KernelFn<Params> Kernels::* kernel,
                const Params& params, void* stream) {
  const Kernels* kernels = select_kernels(set, device);
  if (!kernels || !(kernels->*kernel)) raise_missing(operation, device);
  const DeviceGuard guard(device);
  const char* why = (kernels->*kernel)(params, runtime_for(device, stream));
  if (emulating()) forget_buffers();
  if (why) raise_failed(operation, why);
}

}  // namespace tilewise
