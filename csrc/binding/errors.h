// Which Python exception an Error is.
#pragma once
#include <pybind11/pybind11.h>

#include "tilewise/error.h"

namespace tilewise {

inline PyObject* python_type(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::value: return PyExc_ValueError;
    case ErrorKind::type: return PyExc_TypeError;
    case ErrorKind::not_implemented: return PyExc_NotImplementedError;
    default: return PyExc_RuntimeError;
  }
}

}  // namespace tilewise
