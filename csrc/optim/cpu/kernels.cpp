// CPU kernels of the family, compiled once per instruction set (rules: common/isa.h).
#include "common/isa.h"
#include "optim/cpu/quantize.h"
#include "optim/cpu/shampoo.h"
#include "optim/cpu/square.h"
#include "optim/cpu/step.h"
#include "optim/params.h"

extern "C" const tilewise::optim::Kernels TILEWISE_ISA_TABLE(optim) = {
    &tilewise::step,
    &tilewise::quantize,
    &tilewise::dequantize,
    &tilewise::quantize_matrix,
    &tilewise::dequantize_matrix,
    &tilewise::orthonormalize,
};
