// Starts a kernel with one block for each row.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "walk.cuh"

namespace gkd::cuda {

// A launch that fails is CUDA's last error, which the caller checks.
template <class... Expected, class... Params>
void launch(void (*kernel)(Expected...), int64_t rows, void* stream, const Params&... params) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(rows));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  static_cast<void>(cudaLaunchKernelEx(&config, kernel, params...));
}

}  // namespace gkd::cuda
