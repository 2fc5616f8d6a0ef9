// torch, where this process has loaded it: its stable C interface is looked up there, and nothing is linked.
#pragma once

namespace tilewise {

// A handle for dlsym, or null. Never loads anything.
void* torch_library();

}  // namespace tilewise
