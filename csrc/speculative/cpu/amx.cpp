// CPU kernels of the family that have a version for AMX tiles (rules: common/isa.h).
#include "speculative/cpu/amx.h"

extern "C" const tilewise::speculative::Kernels TILEWISE_ISA_TABLE(speculative) = {
    nullptr, nullptr, nullptr, nullptr, &tilewise::tree_attention_on_tiles, nullptr, nullptr, nullptr,
};
