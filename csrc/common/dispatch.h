// From an operation and a device to the kernels that serve it.
#pragma once
#include "common/runtime.h"
#include "tilewise/error.h"
#include "tilewise/tensor.h"

namespace tilewise {

// The last has no kernels of its own: those of amx ask Runtime whether they may use its instruction.
enum class Isa : int { generic, avx2, avx512, amx, amx_fp16 };
constexpr int kIsaCount = 5;

// A family's kernels on every machine. `Kernels` is the family's struct of KernelFn pointers (its params.h); a null
// pointer in it means that this level has no kernel of its own, and on CPU the next lower one serves.
template <class Kernels>
struct KernelSet {
  const Kernels* cpu[kIsaCount];  // by Isa; null where not built
  const Kernels* cuda;            // null in a CPU-only build
  const char* cuda_symbol;        // the same table's name in an emulator library
};

// Defines `kKernels`, the kernels of `family`, at namespace scope of tilewise. The tables that this build does not have
// are null: their symbols are weak.
#define TILEWISE_KERNEL_TABLE(family, machine) \
  extern "C" const family::Kernels tilewise_##family##_##machine [[gnu::weak]];
#define TILEWISE_KERNEL_SET(family)                                                                             \
  TILEWISE_KERNEL_TABLE(family, generic)                                                                        \
  TILEWISE_KERNEL_TABLE(family, avx2)                                                                           \
  TILEWISE_KERNEL_TABLE(family, avx512)                                                                         \
  TILEWISE_KERNEL_TABLE(family, amx)                                                                            \
  TILEWISE_KERNEL_TABLE(family, cuda)                                                                           \
  static const KernelSet<family::Kernels> kKernels = {{&tilewise_##family##_generic, &tilewise_##family##_avx2, \
                                                       &tilewise_##family##_avx512, &tilewise_##family##_amx},  \
                                                      &tilewise_##family##_cuda,                                \
                                                      "tilewise_" #family "_cuda"};

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

// The function of `Kernels` that serves the device; null if none does.
template <class Kernels, class Function>
Function select_kernel(const KernelSet<Kernels>& set, Device device, Function Kernels::* kernel) {
  if (device.type == DeviceType::cuda) return set.cuda ? set.cuda->*kernel : nullptr;
  if (device.type != DeviceType::cpu) return nullptr;
  if (emulating()) {
    const auto* table = static_cast<const Kernels*>(emulated_table(set.cuda_symbol));
    return table ? table->*kernel : nullptr;
  }
  for (int level = static_cast<int>(current_isa()); level >= 0; level--)
    if (set.cpu[level] && set.cpu[level]->*kernel) return set.cpu[level]->*kernel;
  return nullptr;
}

// Runs one kernel of a family on the tensors' device: run_kernel(op, kAttention, q.device, &Kernels::forward, p, s).
template <class Kernels, class Params>
void run_kernel(const char* operation, const KernelSet<Kernels>& set, Device device, KernelFn<Params> Kernels::* kernel,
                const Params& params, void* stream) {
  const KernelFn<Params> run = select_kernel(set, device, kernel);
  if (!run) raise_missing(operation, device);
  const DeviceGuard guard(device);
  const char* why = run(params, runtime_for(device, stream));
  if (emulating()) forget_buffers();
  if (why) raise_failed(operation, why);
}

}  // namespace tilewise
