// What reductions over threads do with two values; see cluster.cuh.

#pragma once

#include <cuda_runtime.h>

namespace gkd::cuda {

struct Add {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

struct Larger {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

struct Smaller {
  __device__ __forceinline__ int operator()(int a, int b) const { return min(a, b); }
};

}  // namespace gkd::cuda
