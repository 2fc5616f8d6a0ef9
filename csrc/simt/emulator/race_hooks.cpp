// The __tsan_* functions that code compiled with -fsanitize=thread calls at every access. They take the place of
// libtsan, which is not linked: CUDA threads are fibers here, and their rules of ordering are not those of C++.
#include "race_hooks.h"

#include "block.h"
#include "race.h"

namespace simt {
namespace race {

namespace {

bool instrumented = false;

// Runs before every load and store of a kernel.
inline void hook(const void* p, size_t bytes, bool is_write, const void* code) {
  if (!rt::current || !rt::block->config->race) return;
  const rt::Block& b = *rt::block;
  const auto offset = static_cast<const unsigned char*>(p) - b.smem;
  const auto size = static_cast<std::ptrdiff_t>(b.smem_bytes);
  const auto canary = static_cast<std::ptrdiff_t>(rt::kCanaryBytes);
  const bool inside = offset >= 0 && offset < size;
  if (inside && b.config->preempt && rt::block->random.one_in(b.config->preempt)) rt::give_way();
  if (!inside && offset >= -canary && offset < size + canary) {
    return out_of_bounds(rt::current->tid, offset, is_write, code);
  }
  hooked_access(rt::current->tid, p, bytes, is_write, code);
}

}  // namespace

bool enabled() {
  return instrumented;
}

}  // namespace race
}  // namespace simt

// The calls come from kernels (other files of this library), so nothing here is exported but the registration.
extern "C" {

__attribute__((visibility("default"))) void simt_register(const void* p, size_t bytes, const char* name) {
  simt::race::register_region(p, bytes, name);
}
__attribute__((visibility("default"))) void simt_unregister_all() {
  simt::race::unregister_all();
}

void __tsan_init() {
  simt::race::instrumented = true;
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}

#define SIMT_HOOK(name, bytes, is_write)                               \
  void __tsan_##name(void* p) {                                        \
    simt::race::hook(p, bytes, is_write, __builtin_return_address(0)); \
  }
#define SIMT_HOOKS(bytes)                                 \
  SIMT_HOOK(read##bytes, bytes, false)                    \
  SIMT_HOOK(write##bytes, bytes, true)                    \
  SIMT_HOOK(volatile_read##bytes, bytes, false)           \
  SIMT_HOOK(volatile_write##bytes, bytes, true)           \
  SIMT_HOOK(unaligned_read##bytes, bytes, false)          \
  SIMT_HOOK(unaligned_write##bytes, bytes, true)          \
  SIMT_HOOK(unaligned_volatile_read##bytes, bytes, false) \
  SIMT_HOOK(unaligned_volatile_write##bytes, bytes, true)
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)

void __tsan_read_range(void* p, long bytes) {
  simt::race::hook(p, static_cast<size_t>(bytes), false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, long bytes) {
  simt::race::hook(p, static_cast<size_t>(bytes), true, __builtin_return_address(0));
}

// std::atomic, shared_ptr and the guards of local statics in host code of the same files: performed, not checked.
#define SIMT_ATOMIC_UPDATE(bits, type, name)                                     \
  type __tsan_atomic##bits##_##name(volatile void* p, type v, int) {             \
    return __atomic_##name(static_cast<volatile type*>(p), v, __ATOMIC_SEQ_CST); \
  }
#define SIMT_ATOMIC_CAS(bits, type, name)                                                                      \
  bool __tsan_atomic##bits##_compare_exchange_##name(volatile void* p, void* expected, type v, int, int) {     \
    return __atomic_compare_exchange_n(static_cast<volatile type*>(p), static_cast<type*>(expected), v, false, \
                                       __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                                    \
  }
#define SIMT_ATOMICS(bits, type)                                                     \
  type __tsan_atomic##bits##_load(const volatile void* p, int) {                     \
    return __atomic_load_n(static_cast<const volatile type*>(p), __ATOMIC_SEQ_CST);  \
  }                                                                                  \
  void __tsan_atomic##bits##_store(volatile void* p, type v, int) {                  \
    __atomic_store_n(static_cast<volatile type*>(p), v, __ATOMIC_SEQ_CST);           \
  }                                                                                  \
  type __tsan_atomic##bits##_exchange(volatile void* p, type v, int) {               \
    return __atomic_exchange_n(static_cast<volatile type*>(p), v, __ATOMIC_SEQ_CST); \
  }                                                                                  \
  SIMT_ATOMIC_UPDATE(bits, type, fetch_add)                                          \
  SIMT_ATOMIC_UPDATE(bits, type, fetch_sub)                                          \
  SIMT_ATOMIC_UPDATE(bits, type, fetch_and)                                          \
  SIMT_ATOMIC_UPDATE(bits, type, fetch_or)                                           \
  SIMT_ATOMIC_UPDATE(bits, type, fetch_xor)                                          \
  SIMT_ATOMIC_CAS(bits, type, strong)                                                \
  SIMT_ATOMIC_CAS(bits, type, weak)
SIMT_ATOMICS(8, uint8_t)
SIMT_ATOMICS(16, uint16_t)
SIMT_ATOMICS(32, uint32_t)
SIMT_ATOMICS(64, uint64_t)

void __tsan_atomic_thread_fence(int) {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
void __tsan_atomic_signal_fence(int) {
  __atomic_signal_fence(__ATOMIC_SEQ_CST);
}

}  // extern "C"
