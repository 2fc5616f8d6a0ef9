// Asking for a block of keys and values before it is needed, a few cache lines at a time.
#pragma once
#include "common/paged/cpu/rows.h"

namespace tilewise::paged {
namespace {

// The rows of a block in the order of memory, all heads of a token at once: keys, then values. The core waits for 16
// lines at most, so whoever asks for more at a time stops; spread over the work on the block before, they cost nothing.
class Ahead {
 public:
  Ahead(const KeyRows& block, int64_t k_head_bytes, int64_t v_head_bytes, int heads)
      : block_(block), bytes_{span(k_head_bytes, heads), span(v_head_bytes, heads)} {}

  // How many lines each of `calls` calls has to ask for.
  int share(int64_t calls) const {
    return int(ceil_div(block_.count * (ceil_div(bytes_[0], kLine) + ceil_div(bytes_[1], kLine)), calls));
  }
  TILEWISE_INLINE void go_on(int lines) {
    for (; lines > 0; lines--, at_ += kLine) {
      if (at_ >= end_ && !next_row()) return;
      __builtin_prefetch(at_, 0, 2);
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const KeyRows& block_;
  const int64_t bytes_[2];  // of a token
  const char *at_ = nullptr, *end_ = nullptr;
  int row_ = 0;  // keys, then values

  // Heads that lie apart are left to the hardware.
  int64_t span(int64_t head_bytes, int heads) const {
    const bool near = head_bytes >= 0 && head_bytes <= 2 * block_.row_bytes;
    return (near ? (heads - 1) * head_bytes : 0) + block_.row_bytes;
  }
  __attribute__((noinline)) bool next_row() {
    if (row_ >= 2 * block_.count) return false;
    const bool values = row_ >= block_.count;
    const char* first = values ? block_.v[row_ - block_.count] : block_.k[row_];
    row_++;
    if (first != end_) at_ = first - uintptr_t(first) % kLine;  // else it goes on where the last one ended
    end_ = first + bytes_[values];
    return true;
  }
};

}  // namespace
}  // namespace tilewise::paged
