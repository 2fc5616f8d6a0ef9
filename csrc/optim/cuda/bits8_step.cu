#include "optim/cuda/codec8.h"
#include "optim/cuda/launch.h"
#include "optim/cuda/step.h"

namespace tilewise::optim {

template <class P>
using Bits8Step = BlockStep<P, Codec8, false>;
template <class P>
using Bits8StructuredStep = BlockStep<P, Codec8, true>;

StepLaunch bits8_step_of(Float param, bool is_structured) {
  return is_structured ? step_of<Bits8StructuredStep>(param) : step_of<Bits8Step>(param);
}

}  // namespace tilewise::optim
