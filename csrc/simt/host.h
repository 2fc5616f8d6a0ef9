// CPU back-end of simt.h: every CUDA thread is a fiber, every collective a rendezvous of fibers. The functions have the
// names and signatures of device/, plus a defaulted source location for the diagnoses.
#pragma once

#define SIMT_EMULATED 1
// Forced, as on the device, also because g++ does not instrument a struct that a call writes straight to memory.
#define SIMT_DEVICE inline __attribute__((always_inline))
#define SIMT_HD inline

// Two separate defaults: nested in one Site{...} default, g++ 12 would report this header instead of the call site.
#define SIMT_AT const char *file_ = __builtin_FILE(), int line_ = __builtin_LINE()
#define SIMT_SITE \
  rt::Site {      \
    file_, line_  \
  }

#include "host/async.h"
#include "host/launch.h"
#include "host/math.h"
#include "host/memory.h"
#include "host/mma.h"
#include "host/warp.h"
