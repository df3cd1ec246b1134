// Replaces the part of CUDA's runtime that launches kernels, on a device with the limits of an H100; see cuda_runtime.h.

#pragma once

#include <algorithm>
#include <map>
#include <stdexcept>

#include "scheduler.h"

namespace cuda_emulator {

inline int compute_capability = 9;  // the major number; below 9 there are no clusters
inline int multiprocessors = 4;
inline int active_clusters = 2;  // how many run at once
constexpr int kSharedMemory = 227 * 1024, kSharedMemoryUnasked = 48 * 1024;

// The dynamic shared memory that each kernel was allowed to have.
inline std::map<const void*, int>& allowed_shared_memory() {
  static std::map<const void*, int> allowed;
  return allowed;
}

}  // namespace cuda_emulator

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMultiProcessorCount
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = cuda_emulator::compute_capability;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = cuda_emulator::kSharedMemory;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = cuda_emulator::multiprocessors;
  }
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > cuda_emulator::kSharedMemory) return cudaErrorInvalidValue;
  cuda_emulator::allowed_shared_memory()[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel*, const cudaLaunchConfig_t*) {
  *clusters = cuda_emulator::active_clusters;
  return cudaSuccess;
}

template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... arguments) {
  const unsigned blocks = config->numAttrs == 0 ? 1 : config->attrs[0].val.clusterDim.x;
  const auto& allowed = cuda_emulator::allowed_shared_memory();
  const auto found = allowed.find(reinterpret_cast<const void*>(kernel));
  const int most = std::max(cuda_emulator::kSharedMemoryUnasked, found == allowed.end() ? 0 : found->second);
  if (config->gridDim.x % blocks != 0) throw std::runtime_error("the grid is not a whole number of clusters");
  if (blocks > 1 && cuda_emulator::compute_capability < 9) throw std::runtime_error("this device has no clusters");
  if (config->dynamicSmemBytes > std::size_t(most)) throw std::runtime_error("more shared memory than was allowed");
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const cuda_emulator::Shape shape = {int(config->blockDim.x), int(blocks), config->dynamicSmemBytes};
  for (unsigned i = 0; i < config->gridDim.x; i += blocks) {
    cuda_emulator::Cluster::instance().run(shape, int(i), [&] { kernel(arguments...); });
  }
  return cudaSuccess;
}
