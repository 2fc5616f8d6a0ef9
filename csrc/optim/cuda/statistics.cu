#include "optim/cuda/statistics.h"

#include "optim/cuda/launch.h"

namespace tilewise::optim {

const char* tile_statistics(const TensorTable& table, unsigned thread_blocks, void* stream) {
  return launch_table<TileStatistics>(table, thread_blocks, stream);
}
const char* combine_statistics(const TensorTable& table, unsigned thread_blocks, void* stream) {
  return launch_table<CombineStatistics>(table, thread_blocks, stream);
}
const char* invert_mean(const TensorTable& table, unsigned thread_blocks, void* stream) {
  return launch_table<InvertMean>(table, thread_blocks, stream);
}
const char* publish_scales(const TensorTable& table, unsigned thread_blocks, void* stream) {
  return launch_table<PublishScales>(table, thread_blocks, stream);
}

int64_t combine_units(const StepTensor& t) {
  return CombineStatistics::units(t.rows, t.columns);
}
int64_t publish_units(const StepTensor& t) {
  return PublishScales::units(t.rows, t.columns);
}

}  // namespace tilewise::optim
