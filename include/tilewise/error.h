// The one exception type that the library throws. Its message names the operation, the argument, what it got and what
// was expected: "attention: k has head dim 80, expected 64 (q's)".
#pragma once
#include <stdexcept>
#include <string>

namespace tilewise {

enum class ErrorKind {
  value,            // wrong shape or value, inconsistent arguments (Python: ValueError)
  type,             // wrong dtype or type (TypeError)
  not_implemented,  // a valid combination that no kernel serves (NotImplementedError)
  runtime,          // a failure of the device (RuntimeError)
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

}  // namespace tilewise
