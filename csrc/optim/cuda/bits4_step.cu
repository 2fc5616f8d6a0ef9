#include "optim/cuda/codec.h"
#include "optim/cuda/launch.h"
#include "optim/cuda/step.h"

namespace tilewise::optim {

template <class P>
using Bits4Step = BlockStep<P, Codec4, false>;
template <class P>
using Bits4StructuredStep = BlockStep<P, Codec4, true>;

StepLaunch bits4_step_of(Float param, bool is_structured) {
  return is_structured ? step_of<Bits4StructuredStep>(param) : step_of<Bits4Step>(param);
}

}  // namespace tilewise::optim
