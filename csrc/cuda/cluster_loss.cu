// The whole loss of rows that a cluster can hold in shared memory.

#include "cluster_launch.cuh"
#include "cluster_loss.cuh"

namespace gkd::cuda {
namespace {

// The blocks that share a row: as few as can hold it, and more where there are fewer rows than multiprocessors.
template <FloatType type>
int blocks_of_row(const Logits& logits, const Device& device) {
  constexpr int kLanes = Walk<type>::kLanes;
  const auto fits = [&](int blocks) {
    const int64_t bytes = HeldRow<type>::bytes(share_columns(logits.columns, kLanes, blocks));
    return kReductionBytes + bytes <= device.shared_memory;
  };
  int blocks = 1;
  while (blocks <= kMostBlocks && !fits(blocks)) blocks *= 2;
  while (2 * blocks <= kMostBlocks && 2 * blocks * logits.rows <= device.multiprocessors) blocks *= 2;
  return blocks <= kMostBlocks ? blocks : 0;
}

template <FloatType type, class Form>
bool start_loss(const LossParams& params, const Weights& weights, const Device& device, bool alike, void* stream) {
  const Logits& logits = params.gradient.logits;
  const int blocks = blocks_of_row<type>(logits, device);
  if (blocks == 0) return false;
  const auto kernel = cluster_loss_kernel<type, Form>;
  const int share = int(share_columns(logits.columns, Walk<type>::kLanes, blocks));
  const int64_t bytes = kReductionBytes + HeldRow<type>::bytes(share);
  ClusterLaunch launch(1, blocks, kClusterThreads, bytes, stream);
  int clusters = 0;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)) != cudaSuccess ||
      cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) != cudaSuccess || clusters == 0) {
    static_cast<void>(cudaGetLastError());  // another kernel is used instead
    return false;
  }
  launch.config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(logits.rows, clusters) * blocks));
  static_cast<void>(cudaLaunchKernelEx(&launch.config, kernel, params, weights, share, alike));
  return true;
}

}  // namespace

void use_clusters(bool enabled) { clusters_are_enabled() = enabled; }

bool cluster_loss(const LossParams& params, void* stream) {
  const GradientParams& gradient = params.gradient;
  const Logits& logits = gradient.logits;
  const auto device = device_with_clusters();
  if (!device.has_value() || logits.type != FloatType::bf16 || gradient.inverse_softcap != 0) return false;
  const bool alike = lie_alike(logits) &&
                     lie_alike(gradient.out, gradient.out_stride, logits.student, logits.student_stride, logits.type);
  bool started = false;
  GKD_FORM_SWITCH(FloatType::bf16, gradient.kind, gradient.beta, [&](const Weights& weights) {
    started = start_loss<FloatType::bf16, Form>(params, weights, *device, alike, stream);
  });
  return started;
}

}  // namespace gkd::cuda
