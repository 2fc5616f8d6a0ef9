#include "fft_conv/cuda/filter_grad_instances.h"

template const char* tilewise::fft_conv::launch_filter_grad<simt::bf16>(int, dim3, const FilterGradParams<simt::bf16>&,
                                                                        void*);
