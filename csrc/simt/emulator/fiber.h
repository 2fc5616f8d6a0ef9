// Stacks and context switches. A fiber never moves to another host thread.
#pragma once
#include <stddef.h>

// 1: the portable but slow switch (it makes a system call); 0: our own, for x86-64.
#if !defined(SIMT_UCONTEXT)
#if defined(__x86_64__)
#define SIMT_UCONTEXT 0
#else
#define SIMT_UCONTEXT 1
#endif
#endif
#if SIMT_UCONTEXT
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#else
#define SIMT_ASAN 0
#endif

namespace simt {
namespace rt {

struct Stack {
  unsigned char* base;
  size_t size;
};
Stack take_stack();  // from a pool that all host threads share
void return_stack(Stack);

// A suspended computation: one per fiber, plus one for the scheduler of each host thread.
struct Context {
#if SIMT_UCONTEXT
  ucontext_t state;
#else
  void* stack_pointer = nullptr;
#endif
  Stack stack{nullptr, 0};
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// `index` staggers the stack tops: page-aligned stacks would compete for the same cache sets.
void prepare(Context&, Stack, int index, void (*entry)());
void adopt_host_stack(Context&);  // the running host thread's own stack
void switch_context(Context& from, Context& to, bool from_is_finished = false);
void entered_new_context();  // first statement of an entry function

}  // namespace rt
}  // namespace simt
