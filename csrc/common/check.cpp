#include "common/check.h"

#include <cmath>
#include <cstdio>
#include <string>

namespace tilewise {
namespace {

std::string shape_text(const int64_t* dims, int n) {
  std::string s = "(";
  for (int i = 0; i < n; i++) {
    s += dims[i] == kAny ? "*" : std::to_string(dims[i]);
    if (i + 1 < n || n == 1) s += i + 1 < n ? ", " : ",";
  }
  return s + ")";
}

std::string device_text(Device d) {
  if (d.type == DeviceType::cpu) return "cpu";
  return (d.type == DeviceType::cuda ? "cuda:" : "device ") + std::to_string(d.index);
}

[[noreturn]] void raise(ErrorKind kind, const char* operation, const char* argument, const std::string& what) {
  throw Error(kind, std::string(operation) + ": " + argument + " " + what);
}

std::string format_text(const char* format, va_list args) {
  char text[512];
  std::vsnprintf(text, sizeof text, format, args);
  return text;
}

struct Span {
  const char *begin, *end;
};
Span span(const Tensor& t) {
  auto* base = static_cast<const char*>(t.data);
  int64_t low = 0, high = 0;  // in elements
  for (int i = 0; i < t.ndim; i++) {
    const int64_t reach = (t.shape[i] - 1) * t.strides[i];
    (reach < 0 ? low : high) += reach;
  }
  return {base + low * item_size(t.dtype), base + (high + 1) * item_size(t.dtype)};
}

bool same_elements(const Tensor& a, const Tensor& b) {
  if (a.data != b.data || a.ndim != b.ndim || a.dtype != b.dtype) return false;
  for (int i = 0; i < a.ndim; i++)
    if (a.shape[i] != b.shape[i] || (a.shape[i] > 1 && a.strides[i] != b.strides[i])) return false;
  return true;
}

}  // namespace

const char* name_of(DType t) {
  static constexpr const char* names[] = {"float16", "bfloat16", "float32", "float64",    "int8",
                                          "uint8",   "int16",    "int32",   "int64",      "uint16",
                                          "uint32",  "uint64",   "bool",    "unsupported"};
  return names[static_cast<int>(t)];
}

void Check::dims(const Tensor& t, const char* name, int expected) const {
  if (t.ndim == expected) return;
  raise(ErrorKind::value, operation_, name,
        "has shape " + shape_text(t.shape, t.ndim) + ", expected " + std::to_string(expected) + " dimensions");
}

void Check::shape(const Tensor& t, const char* name, std::initializer_list<int64_t> expected) const {
  bool ok = t.ndim == static_cast<int>(expected.size());
  int i = 0;
  for (int64_t e : expected) {
    if (ok && e != kAny && t.shape[i] != e) ok = false;
    i++;
  }
  if (ok) return;
  raise(ErrorKind::value, operation_, name,
        "has shape " + shape_text(t.shape, t.ndim) + ", expected " +
            shape_text(expected.begin(), static_cast<int>(expected.size())));
}

void Check::dtype(const Tensor& t, const char* name, std::initializer_list<DType> allowed) const {
  std::string list;
  for (DType d : allowed) {
    if (t.dtype == d) return;
    list += (list.empty() ? "" : ", ") + std::string(name_of(d));
  }
  raise(ErrorKind::type, operation_, name, "has dtype " + std::string(name_of(t.dtype)) + ", expected " + list);
}

void Check::same_dtype(const Tensor& t, const char* name, const Tensor& as, const char* as_name) const {
  if (t.dtype == as.dtype) return;
  raise(ErrorKind::type, operation_, name,
        "has dtype " + std::string(name_of(t.dtype)) + ", expected " + name_of(as.dtype) + " (" + as_name + "'s)");
}

void Check::same_device(const Tensor& t, const char* name, const Tensor& as, const char* as_name) const {
  if (t.device == as.device) return;
  raise(ErrorKind::value, operation_, name,
        "is on " + device_text(t.device) + ", expected " + device_text(as.device) + " (" + as_name + "'s)");
}

void Check::last_dim_contiguous(const Tensor& t, const char* name) const {
  const int last = t.ndim - 1;
  if (last < 0 || t.shape[last] <= 1 || t.strides[last] == 1 || t.numel() == 0) return;
  raise(ErrorKind::value, operation_, name,
        "has stride " + std::to_string(t.strides[last]) + " in its last dimension, expected 1");
}

void Check::contiguous(const Tensor& t, const char* name) const {
  if (t.contiguous() || t.numel() == 0) return;
  raise(ErrorKind::value, operation_, name, "is not contiguous, expected a contiguous tensor");
}

void Check::output(const Tensor& t, const char* name) const {
  for (int i = 0; i < t.ndim; i++) {
    if (t.shape[i] <= 1 || t.strides[i] != 0) continue;
    raise(ErrorKind::value, operation_, name,
          "has stride 0 in dimension " + std::to_string(i) + ", expected an output whose elements do not overlap");
  }
}

void Check::no_overlap(const Tensor& out, const char* name, const Tensor& in, const char* in_name,
                       bool equal_ok) const {
  if (out.numel() == 0 || in.numel() == 0) return;
  if (equal_ok && same_elements(out, in)) return;
  const Span a = span(out), b = span(in);
  if (a.end <= b.begin || b.end <= a.begin) return;
  raise(ErrorKind::value, operation_, name,
        "overlaps " + std::string(in_name) + " in memory, expected separate memory");
}

float Check::number(double value, const char* name) const {
  const auto number = static_cast<float>(value);
  that(std::isfinite(number), name, "is %g, expected a finite number in float32", value);
  return number;
}

void Check::that(bool ok, const char* argument, const char* format, ...) const {
  if (ok) return;
  va_list args;
  va_start(args, format);
  const std::string what = format_text(format, args);
  va_end(args);
  raise(ErrorKind::value, operation_, argument, what);
}

void Check::fail(ErrorKind kind, const char* argument, const char* format, ...) const {
  va_list args;
  va_start(args, format);
  const std::string what = format_text(format, args);
  va_end(args);
  raise(kind, operation_, argument, what);
}

}  // namespace tilewise
