// A small thread pool for programs without torch and for forked children: sleeping workers, the caller claims chunks
// too.
#pragma once
#include "common/runtime.h"

namespace tilewise::pool {

// Runs body over [0, n) in pieces of `chunk`, on at most `threads` threads. Nested and concurrent calls run inline.
void run(int threads, int64_t n, int64_t chunk, RangeBody body, void* context);
// True in a child of fork(), where the parent's threads no longer exist.
bool forked();

}  // namespace tilewise::pool
