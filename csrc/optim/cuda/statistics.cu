#include "optim/cuda/statistics.h"

#include "optim/cuda/launch.h"

namespace tilewise::optim {

const char* tile_statistics(const TensorTable& table, unsigned thread_blocks, void* stream) {
  return launch_table<TileStatistics>(table, thread_blocks, stream);
}
const char* combine_statistics(const TensorTable& table, unsigned thread_blocks, void* stream) {
  return launch_table<CombineStatistics>(table, thread_blocks, stream);
}
const char* publish_scales(const TensorTable& table, unsigned thread_blocks, void* stream) {
  return launch_table<PublishScales>(table, thread_blocks, stream);
}

}  // namespace tilewise::optim
