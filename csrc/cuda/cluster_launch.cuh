// Starts kernels whose rows are shared by clusters of blocks, where the device can run them.

#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>

#include "cluster.cuh"
#include "walk.cuh"

namespace gkd::cuda {

// Whether clusters may be used at all.
inline std::atomic<bool>& clusters_are_enabled() {
  static std::atomic<bool> enabled = false;
  return enabled;
}

struct Device {
  int shared_memory;  // bytes, the most of a block
  int multiprocessors;
};

// The current device; none where it has no clusters, or they may not be used.
inline std::optional<Device> device_with_clusters() {
  if (!clusters_are_enabled()) return std::nullopt;
  int device = 0, major = 0;
  Device found = {};
  const bool known =
      cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&found.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
  return known && major >= 9 ? std::optional(found) : std::nullopt;
}

// Columns of a row that each of some blocks takes: whole packs of whole warps, with room for a row that starts between
// two multiples of 16 bytes.
inline int64_t share_columns(int64_t columns, int lanes, int blocks) {
  const int64_t unit = 32 * lanes;
  const int64_t share = (columns + lanes - 1 + blocks - 1) / blocks;
  return std::max<int64_t>(1, (share + unit - 1) / unit) * unit;
}

// How a kernel is launched: the attributes have to live as long as the configuration.
struct ClusterLaunch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};

  ClusterLaunch(int64_t clusters, int blocks, int threads, int64_t shared_bytes, void* stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
    config.gridDim = dim3(static_cast<unsigned>(clusters * blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;
};

// The blocks that share a row in one of the three passes: several where the rows alone leave multiprocessors without
// work, as long as each block has a whole step of its walk.
inline int blocks_of_few_rows(int64_t rows, int64_t columns, int stride) {
  const auto device = device_with_clusters();
  int blocks = 1;
  while (device.has_value() && 2 * blocks <= kMostBlocks && 2 * blocks * stride <= columns &&
         2 * blocks * rows <= kBlocksPerMultiprocessor * device->multiprocessors) {
    blocks *= 2;
  }
  return blocks;
}

// One block for each row, or a cluster. The kernel's last parameter is the columns of a block's share. A launch that
// fails is CUDA's last error, which the caller checks.
template <FloatType type, class... Expected, class... Params>
void launch_shared(void (*kernel)(Expected...), const Logits& logits, void* stream, const Params&... params) {
  using RowWalk = Walk<type>;
  const int blocks = blocks_of_few_rows(logits.rows, logits.columns, RowWalk::kStride);
  const int share = int(share_columns(logits.columns, RowWalk::kLanes, blocks));
  ClusterLaunch launch(logits.rows, blocks, kThreads, sizeof(ReductionMemory<kThreads>), stream);
  if (blocks == 1) launch.config.numAttrs = 0;
  static_cast<void>(cudaLaunchKernelEx(&launch.config, kernel, params..., share));
}

}  // namespace gkd::cuda
