// CUDA back-end of simt.h: thin wrappers around PTX, no logic. Each file of device/ has its twin in host/.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#define SIMT_EMULATED 0
#define SIMT_DEVICE __device__ __forceinline__
#define SIMT_HD __host__ __device__ __forceinline__

#include "device/async.h"
#include "device/launch.h"
#include "device/math.h"
#include "device/memory.h"
#include "device/mma.h"
#include "device/warp.h"
