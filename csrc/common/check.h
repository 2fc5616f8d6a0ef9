// Argument checks shared by the families. Every message names operation, argument, what it got and what was expected.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <initializer_list>

#include "tilewise/error.h"
#include "tilewise/tensor.h"

namespace tilewise {

constexpr int64_t kAny = -1;  // in an expected shape: any size

class Check {
 public:
  explicit constexpr Check(const char* operation) : operation_(operation) {}

  void dims(const Tensor& t, const char* name, int expected) const;
  void shape(const Tensor& t, const char* name, std::initializer_list<int64_t> expected) const;
  void dtype(const Tensor& t, const char* name, std::initializer_list<DType> allowed) const;
  void same_dtype(const Tensor& t, const char* name, const Tensor& as, const char* as_name) const;
  void same_device(const Tensor& t, const char* name, const Tensor& as, const char* as_name) const;
  void last_dim_contiguous(const Tensor& t, const char* name) const;
  void contiguous(const Tensor& t, const char* name) const;
  // An output: no two of its elements share memory (as far as strides tell).
  void output(const Tensor& t, const char* name) const;
  // An output that must not share memory with an input; `equal_ok` allows exactly the same elements (in place).
  void no_overlap(const Tensor& out, const char* name, const Tensor& in, const char* in_name,
                  bool equal_ok = false) const;

  // A number as kernels take it, which must be finite.
  float number(double value, const char* name) const;

  // Throws unless `ok`; format gives "got, expected": check.that(d % 8 == 0, "q", "has head dim %ld, expected ...", d).
  [[gnu::format(printf, 4, 5)]] void that(bool ok, const char* argument, const char* format, ...) const;
  [[noreturn, gnu::format(printf, 4, 5)]] void fail(ErrorKind kind, const char* argument, const char* format,
                                                    ...) const;
  const char* operation() const { return operation_; }

 private:
  const char* operation_;
};

const char* name_of(DType t);

}  // namespace tilewise
