// What the compiler's instrumentation reports to the race checker.
#pragma once
#include <stddef.h>

#include <cstddef>
#include <tuple>

namespace simt {
namespace race {

// A place in the kernel: a source file and line, or (line 0) an address in its code.
struct Where {
  const void* at = nullptr;
  int line = 0;
};
inline bool operator<(Where a, Where b) {
  return std::tie(a.at, a.line) < std::tie(b.at, b.line);
}

void hooked_access(int tid, const void*, size_t bytes, bool is_write, const void* code);
void out_of_bounds(int tid, std::ptrdiff_t offset, bool is_write, const void* code);

void register_region(const void*, size_t bytes, const char* name);
void unregister_all();

}  // namespace race
}  // namespace simt
