#include "fft_conv/cuda/filter_grad_instances.h"

template const char* tilewise::fft_conv::launch_filter_grad<simt::fp16>(int, dim3, const FilterGradParams<simt::fp16>&,
                                                                        void*);
