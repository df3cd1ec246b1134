// The ranks' numbers combined on a GPU: one thread for each token.

#include <cuda_runtime.h>

#include "../combine.h"
#include "passes.h"

namespace gkd::cuda {
namespace {

constexpr int kRowsPerBlock = 128;

// The row of this thread; `rows` or more where there is none.
__device__ __forceinline__ int64_t own_row() { return int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x; }

__global__ void __launch_bounds__(kRowsPerBlock) label_logits_kernel(const __grid_constant__ LabelLogitParams params) {
  if (own_row() < params.rows) label_logit_row(params, own_row());
}

__global__ void __launch_bounds__(kRowsPerBlock, 1)
    combine_statistics_kernel(const __grid_constant__ CombineParams params) {
  if (own_row() < params.rows) combine_statistics_row(params, own_row());
}

__global__ void __launch_bounds__(kRowsPerBlock, 1)
    combine_sums_kernel(const __grid_constant__ CombineSumsParams params) {
  if (own_row() < params.rows) combine_sums_row(params, own_row());
}

// A launch that fails is CUDA's last error, which the caller checks.
template <class Params>
void launch(void (*kernel)(Params), const Params& params, void* stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>((params.rows + kRowsPerBlock - 1) / kRowsPerBlock));
  config.blockDim = dim3(kRowsPerBlock);
  config.stream = static_cast<cudaStream_t>(stream);
  static_cast<void>(cudaLaunchKernelEx(&config, kernel, params));
}

}  // namespace

void label_logits(const LabelLogitParams& params, void* stream) { launch(label_logits_kernel, params, stream); }

void combine_statistics(const CombineParams& params, void* stream) {
  launch(combine_statistics_kernel, params, stream);
}

void combine_sums(const CombineSumsParams& params, void* stream) { launch(combine_sums_kernel, params, stream); }

}  // namespace gkd::cuda
