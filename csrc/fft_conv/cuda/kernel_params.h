// What the device kernels of the family receive.
#pragma once
#include "fft_conv/params.h"
#include "simt/simt.h"

namespace tilewise::fft_conv {

using namespace simt;

// The rows of a [b, h, length] tensor; a null tensor has null rows.
template <class T>
struct Rows {
  T* data;
  Strides strides;

  SIMT_DEVICE T* row(int b, int h) const { return data ? data + b * strides.batch + h * strides.head : nullptr; }
};

// v = in * in_gate, z = k conv v + skip * v, out[i] = gate[i] * z. The input gradient is the same with the conjugate
// spectrum: in = dy, in_gate = postgate, out = {du, dpregate}, gate = {pregate, u}. A null gate is 1.
template <class T>
struct ConvParams {
  Rows<const T> in, in_gate;
  Rows<const T> gate[2];
  Rows<T> out[2];
  const float* skip;            // [h] or null
  float* dots;                  // [grid.y, h]: sums of v gate[0] gate[1] over the block's rows; or null
  const uint4* tables;          // of the transform's factors
  const void* spectrum;         // [h, n]: fp16 in fragment order (n / 4 uint4), or float2 in bit-reversed order
  const float* spectrum_scale;  // [h]: power of two that undoes the spectrum's scaling (fp16 only)
  int batch, length, rows_per_block;
  bool vector;  // every row is 16-byte aligned and length % 8 == 0
};

// partials[i] = the correlation of dy * dy_gate with u * u_gate over some rows: n real parts, then (circular) n
// imaginary parts, in the ring x^n = i.
template <class T>
struct FilterGradParams {
  Rows<const T> u, u_gate, dy, dy_gate;
  float* partials;  // [partials, h, 1 or 2, n]
  const uint4* tables;
  int batch, length, rows_per_block;
  bool circular, vector;
};

}  // namespace tilewise::fft_conv
