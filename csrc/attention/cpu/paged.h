// Attention over a paged cache: a token sees the keys up to its own place, or a window around it.
#pragma once
#include "attention/params.h"
#include "common/isa.h"
#include "common/paged/cpu/attention.h"

namespace tilewise {
namespace {

using namespace attention;

struct WindowVisibility {
  using Params = PagedParams;
  int64_t length, shift;  // keys; the diagonal of token 0
  int left, right;

  WindowVisibility(const Params& p, int64_t b)
      : length(p.seq_lens[b]), shift(length - p.tokens), left(p.window_left), right(p.window_right) {}

  int64_t first(int token) const { return left == kUnlimited ? 0 : max_of<int64_t>(0, shift + token - left); }
  int64_t end(int token) const {
    return right == kUnlimited ? length : max_of<int64_t>(0, min_of(length, shift + token + right + 1));
  }

  paged::KeyRange keys(int token, int tokens) const {
    const int last = token + tokens - 1;
    paged::KeyRange range = {first(token), max_of(first(token), end(last)), first(last), end(token)};
    if (range.full_end <= range.full_first) range.full_first = range.full_end = range.first;
    return range;
  }
  bool blind(int) const { return false; }  // who sees nothing has a sum of 0
  paged::KeyBits seen(int token, int64_t key) const {
    return {{between(first(token) - key, end(token) - key), between(first(token) - key - 64, end(token) - key - 64)}};
  }

 private:
  static uint64_t below(int64_t n) { return n >= 64 ? ~uint64_t(0) : n <= 0 ? 0 : (uint64_t(1) << n) - 1; }
  static uint64_t between(int64_t first, int64_t end) { return below(end) & ~below(first); }
};

const char* paged_attention(const PagedParams& p, const Runtime& rt) {
  return paged::attend_float_pages<WindowVisibility>(p, rt);
}
const char* paged_attention_codes(const PagedParams& p, const Runtime& rt) {
  return paged::attend_code_pages<WindowVisibility>(p, rt);
}

}  // namespace
}  // namespace tilewise
