#include "fft_conv/cuda/conv_instances.h"

template const char* tilewise::fft_conv::launch_conv<simt::fp16>(int, dim3, const ConvParams<simt::fp16>&, void*);
