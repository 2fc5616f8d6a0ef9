// CPU kernels of the family that have a version for AMX tiles (rules: common/isa.h).
#include "attention/cpu/amx.h"
#include "attention/cpu/amx_backward.h"

extern "C" const tilewise::attention::Kernels TILEWISE_ISA_TABLE(attention) = {
    &tilewise::forward_on_tiles,
    &tilewise::backward_on_tiles,
    nullptr,  // pack_mask
};
