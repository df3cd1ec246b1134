// Reductions over a block's threads, in an order that does not depend on timing.

#pragma once

#include <cuda_runtime.h>

#include "walk.cuh"

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

// Each of n values, combined over all threads; every thread gets the results. All threads of the block must call it.
template <int n, class T, class Combine>
__device__ __forceinline__ void block_reduce(T (&values)[n], Combine combine) {
  constexpr int kWarp = 32;
  __shared__ T of_warp[kThreads / kWarp][n];
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      values[i] = combine(values[i], __shfl_xor_sync(0xFFFFFFFFu, values[i], offset));
    }
  }
  __syncthreads();  // an earlier call's `of_warp` has been read by all
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int i = 0; i < n; ++i) of_warp[threadIdx.x / kWarp][i] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i) {
    values[i] = of_warp[0][i];
#pragma unroll
    for (int warp = 1; warp < kThreads / kWarp; ++warp) values[i] = combine(values[i], of_warp[warp][i]);
  }
}

}  // namespace gkd::cuda
