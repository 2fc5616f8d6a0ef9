#include "common/dispatch.h"

#include <dlfcn.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <string>

#include "common/cuda_device.h"
#include "common/threads.h"
#include "tilewise/runtime.h"

namespace tilewise {
namespace {

constexpr const char* kIsaNames[kIsaCount] = {"generic", "avx2", "avx512", "amx", "amx_fp16"};

// AMX tiles with products of bf16 and bytes, and the operating system's leave to use them, which holds for all threads.
// Asked of the processor itself: not every compiler knows the features' names.
bool may_use_tiles() {
#if defined(__x86_64__) && defined(SYS_arch_prctl)
  constexpr unsigned kAvx512Bf16 = 1u << 5;
  constexpr unsigned kVectors = 1u << 6 | 1u << 8 | 1u << 11;  // AVX-512 VBMI2, GFNI, AVX-512 VNNI
  constexpr unsigned kAmx = 1u << 22 | 1u << 24 | 1u << 25;    // bf16, tiles, bytes
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (c & kVectors) != kVectors || (d & kAmx) != kAmx) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & kAvx512Bf16)) return false;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

bool tiles_take_fp16() {
#if defined(__x86_64__)
  constexpr unsigned kAmxFp16 = 1u << 21;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & kAmxFp16;
#else
  return false;
#endif
}

bool machine_has(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();  // also asks the operating system whether it saves the wide registers
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (isa == Isa::avx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (isa == Isa::avx512) return avx512;
  if (isa == Isa::amx) return avx512 && may_use_tiles();
  if (isa == Isa::amx_fp16) return avx512 && may_use_tiles() && tiles_take_fp16();
#endif
  return isa == Isa::generic;
}

Isa initial_isa() {
  const char* wanted = std::getenv("TILEWISE_ISA");
  Isa best = Isa::generic;
  for (int i = 0; i < kIsaCount && machine_has(Isa(i)); i++) {
    best = Isa(i);
    if (wanted && std::string(wanted) == kIsaNames[i]) break;
  }
  return best;
}

std::atomic<Isa>& isa_state() {
  static std::atomic<Isa> state{initial_isa()};
  return state;
}

std::string device_name(Device d) {
  if (d.type == DeviceType::cpu) return emulating() ? "emulated" : "cpu";
  return d.type == DeviceType::cuda ? "cuda" : "this device";
}

constexpr const char* kFaultTexts[kFaultCount] = {
    "an unknown fault",
    "cu_seqlens that decrease or overrun the packed tensors, expected 0 <= cu_seqlens[i] <= cu_seqlens[i+1] <= tokens",
    "a block_table entry outside the page pool, expected 0 <= page < pages",
    "a sequence length beyond its block table, expected seq_len <= pages per row * page_size",
    "a tree parent that does not precede its node, expected parent[0] = -1 and 0 <= parent[i] < i",
    "n_nodes outside the tree, expected 1 <= n_nodes <= N",
    "a path or accept_len outside the tree, expected 0 <= path[i] < N and accept_len < path length",
    "a sparse index that its matrix does not allow, expected two rising positions in every four inputs (2:4)",
};

uint32_t* fault_word(Device device) {
  static uint32_t emulated_word = kNoFault;
  return device.type == DeviceType::cuda ? cuda::fault_word(device.index) : &emulated_word;
}

// The emulator library, when one is loaded. Several may be loaded over a process's life (plain, race-checked); none is
// ever closed, because kernels may hold thread-local state.
struct Emulator {
  void* handle = nullptr;
  void (*register_buffer)(const void*, size_t, const char*) = nullptr;
  void (*unregister_all)() = nullptr;
};
Emulator emulator;

template <class Fn>
void find_symbol(Fn& fn, void* handle, const char* name) {
  fn = reinterpret_cast<Fn>(dlsym(handle, name));
}

}  // namespace

Isa current_isa() {
  return isa_state().load(std::memory_order_relaxed);
}

const char* isa() {
  return kIsaNames[static_cast<int>(current_isa())];
}

std::vector<std::string> isa_levels() {
  std::vector<std::string> levels;
  for (int i = 0; i < kIsaCount && machine_has(Isa(i)); i++) levels.push_back(kIsaNames[i]);
  return levels;
}

void set_isa(const std::string& name) {
  for (int i = 0; i < kIsaCount; i++) {
    if (name != kIsaNames[i] || !machine_has(Isa(i))) continue;
    isa_state().store(Isa(i));
    return;
  }
  std::string levels;
  for (const auto& level : isa_levels()) levels += (levels.empty() ? "" : ", ") + level;
  throw Error(ErrorKind::value, "set_isa: name is '" + name + "', expected one of " + levels);
}

void emulate(const char* path) {
  if (!path || !*path) {
    emulator = {};
    return;
  }
  Emulator next;
  next.handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!next.handle) throw Error(ErrorKind::runtime, std::string("emulate: path cannot be loaded: ") + dlerror());
  find_symbol(next.register_buffer, next.handle, "simt_register");
  find_symbol(next.unregister_all, next.handle, "simt_unregister_all");
  emulator = next;
}

bool emulating() {
  return emulator.handle != nullptr;
}

const void* emulated_table(const char* symbol) {
  return dlsym(emulator.handle, symbol);
}

void note_buffer(const void* data, size_t bytes, const char* name) {
  if (emulator.register_buffer && data && bytes) emulator.register_buffer(data, bytes, name);
}

void forget_buffers() {
  if (emulator.unregister_all) emulator.unregister_all();
}

DeviceGuard::DeviceGuard(Device device) {
  if (device.type == DeviceType::cuda) previous_ = cuda::exchange_device(device.index);
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) cuda::exchange_device(previous_);
}

void raise_missing(const char* operation, Device device) {
  if (device.type == DeviceType::cuda && !cuda::built())
    throw Error(ErrorKind::runtime,
                std::string(operation) + ": tensors are on cuda, but this build has no CUDA kernels");
  throw Error(ErrorKind::not_implemented, std::string(operation) + ": no kernel for " + device_name(device));
}

void raise_failed(const char* operation, const char* why) {
  throw Error(ErrorKind::runtime, std::string(operation) + ": " + why);
}

bool host_checks_indices(Device device) {
  return device.type == DeviceType::cpu && !emulating();
}

Runtime runtime_for(Device device, void* stream) {
  Runtime rt = make_runtime(stream);
  rt.fp16_tiles = current_isa() == Isa::amx_fp16;
  rt.fault = host_checks_indices(device) ? nullptr : fault_word(device);
  if (rt.fault && *rt.fault != kNoFault) {
    const uint32_t fault = *rt.fault;
    *rt.fault = kNoFault;
    throw Error(ErrorKind::value, std::string("an earlier tilewise call on this device met ") +
                                      kFaultTexts[fault < kFaultCount ? fault : 0]);
  }
  return rt;
}

const char* version() {
  return TILEWISE_VERSION;
}

std::vector<std::string> cuda_architectures() {
  std::vector<std::string> list;
  std::string all = TILEWISE_CUDA_ARCHS, item;
  for (char c : all + ",") {
    if (c != ',') {
      item += c;
    } else if (!item.empty()) {
      list.push_back(item);
      item.clear();
    }
  }
  return list;
}

std::vector<CudaDevice> cuda_devices() {
  return cuda::devices();
}

}  // namespace tilewise
