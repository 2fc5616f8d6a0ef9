// Stops the process when a fiber runs for very long without waiting: fibers are cooperative, so a spin loop in a kernel
// never ends.
#pragma once
#include "../simt.h"

namespace simt {
namespace rt {

// Watches the calling host thread while it runs blocks.
class HeartbeatScope {
 public:
  explicit HeartbeatScope(unsigned limit_s);
  ~HeartbeatScope();
  HeartbeatScope(const HeartbeatScope&) = delete;
  HeartbeatScope& operator=(const HeartbeatScope&) = delete;
};

void heartbeat(const Thread* running);  // at each fiber switch

}  // namespace rt
}  // namespace simt
