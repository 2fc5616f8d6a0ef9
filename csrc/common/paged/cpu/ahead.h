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
    const char* stop = at_ + lines * kLine;
    if (stop > end_) return go_on_by_rows(lines);
#pragma GCC unroll 1
    for (; at_ != stop; at_ += kLine) __builtin_prefetch(at_, 0, 2);
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
  const char* row(int i) const { return i < block_.count ? block_.k[i] : block_.v[i - block_.count]; }
  __attribute__((noinline)) void go_on_by_rows(int lines) {
    for (; lines > 0; lines--, at_ += kLine) {
      if (at_ >= end_ && !next_rows()) return;
      __builtin_prefetch(at_, 0, 2);
    }
  }
  // The next row, and those that go on where it ends.
  bool next_rows() {
    if (row_ >= 2 * block_.count) return false;
    const char* first = row(row_);
    if (first != end_) at_ = first - uintptr_t(first) % kLine;  // else it goes on where the last one ended
    end_ = first;
    do end_ += bytes_[row_++ >= block_.count];
    while (row_ < 2 * block_.count && row(row_) == end_);
    return true;
  }
};

}  // namespace
}  // namespace tilewise::paged
