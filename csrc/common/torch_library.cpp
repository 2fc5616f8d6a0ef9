#include "common/torch_library.h"

#include <dlfcn.h>

namespace tilewise {

void* torch_library() {
  // Python loads libtorch_cpu with RTLD_LOCAL: dlsym alone would not find it.
  return dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY | RTLD_LOCAL);
}

}  // namespace tilewise
