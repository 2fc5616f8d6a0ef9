// What the probe and bug kernels share.
#pragma once
#include "simt/simt.h"

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

namespace probes {

using namespace simt;

// A name as a case label: the kernels switch on the names that Python passes.
SIMT_HD constexpr uint32_t id(const char* name) {
  uint32_t hash = 2166136261u;
  for (; *name; name++) hash = (hash ^ static_cast<unsigned char>(*name)) * 16777619u;
  return hash;
}

constexpr int kWords = 16;                  // per thread, of input and of output
constexpr uint32_t kUnknown = 0xbadc0de5u;  // written where a kernel does not know the name

struct Params {
  const uint32_t* in;
  uint32_t* out;
  uint32_t op;
};

}  // namespace probes
