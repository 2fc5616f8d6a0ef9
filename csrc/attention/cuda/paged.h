// Attention over a paged cache: a token sees the keys up to its own place, or a window around it.
#pragma once
#include "attention/params.h"
#include "common/paged/cuda/launch.h"

namespace tilewise::attention {

using namespace simt;

struct WindowVisibility {
  using Params = PagedParams;
  static constexpr int kWords = 0;
  int first, end;
  int length, shift;  // keys; the diagonal of token 0
  int left, right, full_first, full_end;

  SIMT_DEVICE WindowVisibility(const Params& p, int b, int first_token, int last_token, uint32_t* fault)
      : length(paged::length_of(p.table, p.seq_lens, b, fault)),
        shift(length - p.tokens),
        left(p.window_left),
        right(p.window_right) {
    first = first_key(first_token), end = end_key(last_token);
    full_first = first_key(last_token), full_end = end_key(first_token);
  }
  SIMT_DEVICE bool full(int key, int count) const { return key >= full_first && key + count <= full_end; }

  SIMT_DEVICE static const uint32_t* words_of(const Params&, int, int) { return nullptr; }

  struct Row {
    int first, end;

    SIMT_DEVICE bool sees(int key) const { return key >= first && key < end; }
    SIMT_DEVICE bool blind() const { return first >= end; }
  };
  SIMT_DEVICE Row row(int token, const uint32_t*) const { return {first_key(token), end_key(token)}; }

 private:
  SIMT_DEVICE int first_key(int token) const {
    const int key = left == kUnlimited ? 0 : shift + token - left;
    return key > 0 ? key : 0;
  }
  SIMT_DEVICE int end_key(int token) const {
    const int64_t key = right == kUnlimited ? length : (int64_t)shift + token + right + 1;
    return key < 0 ? 0 : key < length ? (int)key : length;
  }
};

}  // namespace tilewise::attention
