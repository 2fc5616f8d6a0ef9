// CPU kernels of the family, compiled once per instruction set (rules: common/isa.h).
#include "fft_conv/cpu/backward.h"
#include "fft_conv/cpu/forward.h"

extern "C" const tilewise::fft_conv::Kernels TILEWISE_ISA_TABLE(fft_conv) = {
    &tilewise::forward,
    &tilewise::backward,
    nullptr,  // no workspace: scratch memory serves
    nullptr,
    nullptr,  // every call is served
};
