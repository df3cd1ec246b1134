// The functions that the tests call: the GPU's kernels, emulated, and the CPU's. Each returns an error's text, or null.

#include <cuda_runtime.h>

#include <string>

#include "../../csrc/cuda/passes.h"
#include "../../csrc/cuda/reduce.cuh"

namespace gkd::generic {
void statistics(const StatisticsParams& params, int64_t begin, int64_t end);
void sums(const SumsParams& params, int64_t begin, int64_t end);
void gradient(const GradientParams& params, int64_t begin, int64_t end);
void softcap(const SoftcapParams& params, int64_t begin, int64_t end);
}  // namespace gkd::generic

namespace {

template <class Call>
const char* guarded(const Call& call) {
  static std::string error;
  try {
    call();
    return nullptr;
  } catch (const std::exception& exception) {
    error = exception.what();
    return error.c_str();
  }
}

void wait_in_some_threads() {
  if (threadIdx.x % 2 == 0) __syncthreads();
}

void wait_at_two_places() {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void shuffle_in_some_threads() {
  if (threadIdx.x % 2 == 0) __shfl_xor_sync(0xFFFFFFFFu, 1.0f, 1);
}

void read_misaligned() {
  alignas(16) static char memory[32];
  __ldcs(reinterpret_cast<const uint4*>(memory + 4));
}

// out[0] = the sum over all threads of x = 1, 2, 3, ..., and out[1] that of 2 x, in each thread.
void reduce_twice(float* out) {
  for (int i = 0; i < 2; ++i) {
    float x[1] = {float((i + 1) * (threadIdx.x + 1))};
    gkd::cuda::block_reduce(x, gkd::cuda::Add());
    out[2 * threadIdx.x + i] = x[0];
  }
}

template <class... Params>
const char* run(void (*kernel)(Params...), Params... params) {
  return guarded([&] {
    cudaLaunchConfig_t config = {dim3(1), dim3(gkd::cuda::kThreads), 0, nullptr};
    cudaLaunchKernelEx(&config, kernel, params...);
  });
}

}  // namespace

extern "C" {

const char* cuda_statistics(const gkd::StatisticsParams* params) {
  return guarded([&] { gkd::cuda::statistics(*params, nullptr); });
}
const char* cuda_sums(const gkd::SumsParams* params) {
  return guarded([&] { gkd::cuda::sums(*params, nullptr); });
}
const char* cuda_gradient(const gkd::GradientParams* params) {
  return guarded([&] { gkd::cuda::gradient(*params, nullptr); });
}
const char* cuda_softcap(const gkd::SoftcapParams* params) {
  return guarded([&] { gkd::cuda::softcap(*params, nullptr); });
}

const char* cpu_statistics(const gkd::StatisticsParams* params) {
  return guarded([&] { gkd::generic::statistics(*params, 0, params->logits.rows); });
}
const char* cpu_sums(const gkd::SumsParams* params) {
  return guarded([&] { gkd::generic::sums(*params, 0, params->logits.rows); });
}
const char* cpu_gradient(const gkd::GradientParams* params) {
  return guarded([&] { gkd::generic::gradient(*params, 0, params->logits.rows); });
}
const char* cpu_softcap(const gkd::SoftcapParams* params) {
  return guarded([&] { gkd::generic::softcap(*params, 0, params->logits.rows); });
}

void reverse_threads(bool reverse) { cuda_emulator::reverse_order = reverse; }

const char* cuda_reduce_twice(float* out) { return run(reduce_twice, out); }

// Kernels that CUDA does not allow.
const char* wrong_wait_in_some_threads() { return run(wait_in_some_threads); }
const char* wrong_wait_at_two_places() { return run(wait_at_two_places); }
const char* wrong_shuffle_in_some_threads() { return run(shuffle_in_some_threads); }
const char* wrong_read_misaligned() { return run(read_misaligned); }
}
