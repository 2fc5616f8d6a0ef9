// CPU kernels of the family, compiled once per instruction set (rules: common/isa.h).
#include "common/isa.h"
#include "speculative/cpu/tree.h"
#include "speculative/params.h"

extern "C" const tilewise::speculative::Kernels TILEWISE_ISA_TABLE(speculative) = {
    &tilewise::tree_finalize,
};
