// What the library was built for and what it found on this machine; thread and instruction-set control.
#pragma once
#include <string>
#include <vector>

namespace tilewise {

const char* version();
// CUDA architectures compiled into this build ("80", "90a", ...); empty for a CPU-only build.
std::vector<std::string> cuda_architectures();

// CPU instruction sets this machine can run, in rising order: "generic", "avx2", "avx512", "amx", "amx_fp16".
std::vector<std::string> isa_levels();
const char* isa();
// Selects a level of isa_levels(); throws Error (value) for any other name. The environment variable TILEWISE_ISA does
// the same at load time, and is clipped to what the machine can run.
void set_isa(const std::string& name);

// Where parallel loops run: "torch" (torch's own thread team, whenever torch is loaded), "pool" or "serial".
// TILEWISE_THREADS=torch|pool|serial forces one.
const char* thread_backend();
int num_threads();
// For programs without torch; 0 restores the number of CPUs. With torch loaded, torch.set_num_threads decides.
void set_num_threads(int n);
// Looks for torch's thread team again; the Python package calls it after importing torch.
bool attach_torch_threads();

struct CudaDevice {
  std::string name;
  int compute_capability;  // 90 for 9.0
  size_t memory_bytes;
};
std::vector<CudaDevice> cuda_devices();

}  // namespace tilewise
