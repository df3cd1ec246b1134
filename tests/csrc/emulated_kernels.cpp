// The functions that the tests call: the GPU's kernels, emulated, and the CPU's. Each returns an error's text, or null.

#include <cuda_runtime.h>

#include <string>

#include "../../csrc/cuda/cluster.cuh"
#include "../../csrc/cuda/passes.h"
#include "../../csrc/cuda/reduce.cuh"
#include "../../csrc/cuda/walk.cuh"
#include "cuda_emulator/cuda_pipeline.h"

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

using Cluster = gkd::cuda::Cluster<64>;

// out[8 * thread] and so on = the sums over all threads of the cluster of x, 2 x, 3 x, ... for x = 1, 2, 3, ...
void reduce_over_a_cluster(float* out) {
  Cluster cluster(static_cast<Cluster::Memory*>(gkd::cuda::dynamic_memory()));
  for (int i = 0; i < 8; ++i) {
    float x[2] = {0, float((i + 1) * (blockIdx.x * blockDim.x + threadIdx.x + 1))};
    cluster.reduce(x, gkd::cuda::OfAll<gkd::cuda::Add>());
    out[8 * (blockIdx.x * blockDim.x + threadIdx.x) + i] = x[1] + x[0];
  }
}

namespace cg = cooperative_groups;

void wait_in_some_blocks() {
  if (blockIdx.x % 2 == 0) cg::this_cluster().sync();
}

void leave_before_others_write() {
  auto* memory = static_cast<int*>(gkd::cuda::dynamic_memory());
  cg::this_cluster().sync();
  if (blockIdx.x == 0) return;
  __syncthreads();
  *cg::this_cluster().map_shared_rank(memory, 0) = 1;
}

void write_before_others_run() {
  *cg::this_cluster().map_shared_rank(static_cast<int*>(gkd::cuda::dynamic_memory()), 1 - int(blockIdx.x)) = 1;
}

void write_outside_of_the_memory() {
  int mine = 0;
  cg::this_cluster().sync();
  *cg::this_cluster().map_shared_rank(&mine, 1) = 1;
}

void leave_before_copies_arrive() {
  alignas(16) static char from[16];
  __pipeline_memcpy_async(static_cast<char*>(gkd::cuda::dynamic_memory()) + 16 * threadIdx.x, from, 16);
  __pipeline_commit();
}

// out[thread] = 1 where it used a copy before it had arrived.
void use_copies(float* out) {
  alignas(16) static float from[4] = {1, 2, 3, 4};
  auto* memory = static_cast<float*>(gkd::cuda::dynamic_memory()) + 4 * threadIdx.x;
  __pipeline_memcpy_async(memory, from, 16);
  __pipeline_commit();
  __pipeline_commit();
  __pipeline_wait_prior(2);
  const bool early = memory[0] == 1;
  __pipeline_wait_prior(1);
  out[threadIdx.x] = !early && memory[0] == 1 && memory[3] == 4;
}

template <class... Params>
const char* run_cluster(void (*kernel)(Params...), Params... params) {
  return guarded([&] {
    cudaLaunchAttribute attribute = {cudaLaunchAttributeClusterDimension, {{2, 1, 1}}};
    cudaLaunchConfig_t config = {dim3(2), dim3(64), sizeof(Cluster::Memory), nullptr, &attribute, 1};
    cudaLaunchKernelEx(&config, kernel, params...);
  });
}

template <class... Params>
const char* run(void (*kernel)(Params...), Params... params) {
  return guarded([&] {
    cudaLaunchConfig_t config = {dim3(1), dim3(gkd::cuda::kThreads), 0, nullptr, nullptr, 0};
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
const char* cuda_cluster_loss(const gkd::LossParams* params) {
  return guarded([&] {
    if (!gkd::cuda::cluster_loss(*params, nullptr)) throw std::runtime_error("not started");
  });
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

void set_compute_capability(int major) { cuda_emulator::compute_capability = major; }
void use_clusters(bool enabled) { gkd::cuda::use_clusters(enabled); }
void set_multiprocessors(int count) { cuda_emulator::multiprocessors = count; }
void reverse_threads(bool reverse) { cuda_emulator::reverse_order = reverse; }

const char* cuda_reduce_over_a_cluster(float* out) { return run_cluster(reduce_over_a_cluster, out); }
const char* cuda_use_copies(float* out) { return run_cluster(use_copies, out); }

// Kernels that CUDA does not allow.
const char* wrong_wait_in_some_threads() { return run(wait_in_some_threads); }
const char* wrong_wait_at_two_places() { return run(wait_at_two_places); }
const char* wrong_shuffle_in_some_threads() { return run(shuffle_in_some_threads); }
const char* wrong_read_misaligned() { return run(read_misaligned); }
const char* wrong_wait_in_some_blocks() { return run_cluster(wait_in_some_blocks); }
const char* wrong_leave_before_others_write() { return run_cluster(leave_before_others_write); }
const char* wrong_write_before_others_run() { return run_cluster(write_before_others_run); }
const char* wrong_write_outside_of_the_memory() { return run_cluster(write_outside_of_the_memory); }
const char* wrong_leave_before_copies_arrive() { return run_cluster(leave_before_copies_arrive); }
}
