#include "fiber.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <mutex>
#include <vector>

#if SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !SIMT_UCONTEXT
// Saves the callee-saved registers on the old stack and restores them from the new one.
extern "C" void simt_switch(void** save_stack_pointer, void* new_stack_pointer);
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch,.-simt_switch
)");
#endif

namespace simt {
namespace rt {

namespace {

constexpr size_t kStackBytes = (SIMT_ASAN ? 512 : 128) * 1024;
constexpr size_t kGuardBytes = 4096;

std::mutex pool_mutex;
std::vector<Stack> pool;

Stack map_stack() {
  void* p = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    perror("simt: mmap of a fiber stack");
    abort();
  }
  mprotect(p, kGuardBytes, PROT_NONE);  // an overflow faults instead of overwriting a neighbour
  return {static_cast<unsigned char*>(p) + kGuardBytes, kStackBytes};
}

}  // namespace

Stack take_stack() {
  std::lock_guard<std::mutex> lock(pool_mutex);
  if (pool.empty()) return map_stack();
  const Stack s = pool.back();
  pool.pop_back();
  return s;
}

void return_stack(Stack s) {
#if SIMT_ASAN
  __asan_unpoison_memory_region(s.base, s.size);  // an abandoned fiber leaves its frames' red zones behind
#endif
  std::lock_guard<std::mutex> lock(pool_mutex);
  pool.push_back(s);
}

void prepare(Context& context, Stack stack, int index, void (*entry)()) {
  context.stack = stack;
#if SIMT_UCONTEXT
  (void)index;
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack.base;
  context.state.uc_stack.ss_size = stack.size;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
#else
  auto** top = reinterpret_cast<void**>(stack.base + stack.size - index * 192 % 4096);
  *--top = nullptr;  // the return address of `entry`: the ABI wants rsp % 16 == 8 there
  *--top = reinterpret_cast<void*>(entry);
  for (int saved_register = 0; saved_register < 6; saved_register++) *--top = nullptr;
  context.stack_pointer = top;
#endif
}

void adopt_host_stack(Context& context) {
#if SIMT_ASAN
  pthread_attr_t attributes;
  void* base = nullptr;
  size_t size = 0;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &base, &size);
  pthread_attr_destroy(&attributes);
  context.stack = {static_cast<unsigned char*>(base), size};
#else
  (void)context;
#endif
}

void switch_context(Context& from, Context& to, bool from_is_finished) {
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(from_is_finished ? nullptr : &from.fake_stack, to.stack.base, to.stack.size);
#else
  (void)from_is_finished;
#endif
#if SIMT_UCONTEXT
  swapcontext(&from.state, &to.state);
#else
  simt_switch(&from.stack_pointer, to.stack_pointer);
#endif
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void entered_new_context() {
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

}  // namespace rt
}  // namespace simt
