// CPU kernels of the family, compiled once per instruction set (rules: common/isa.h).
#include "common/isa.h"
#include "sparse/cpu/csr.h"
#include "sparse/cpu/nm_backward.h"
#include "sparse/cpu/nm_forward.h"
#include "sparse/params.h"

extern "C" const tilewise::sparse::Kernels TILEWISE_ISA_TABLE(sparse) = {
    &tilewise::nm_forward, &tilewise::nm_grad_input, &tilewise::nm_grad_values,
    &tilewise::column_sum, &tilewise::csr_forward,   &tilewise::csr_grad_values,
};
