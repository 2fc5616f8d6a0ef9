#include "optim/cuda/full_step.h"

#include "optim/cuda/launch.h"

namespace tilewise::optim {

StepLaunch full_step_of(Float param) {
  return step_of<FullStep>(param);
}

}  // namespace tilewise::optim
