// The student's statistics over a top-k on a GPU, and what the ranks' numbers add up to: a block takes a row.

#include "../switches.h"
#include "launch.cuh"
#include "top_k.cuh"
#include "top_k.h"

namespace gkd::cuda {
namespace {

constexpr int kWindow = 1 << 16;  // columns of which one bit each is in shared memory

// Marks the columns of a row that are among its ids, a window of the row at a time.
template <FloatType type>
struct ExcludedColumns {
  static constexpr int kLanes = Walk<type>::kLanes;
  static constexpr int kWordsOfBits = (kWindow + 32) / 32;
  uint32_t* bits;  // bit i is column i - before of the window, so that a pack's bits are in one word
  int before;

  // All threads of the block call it. `row` is the window's.
  __device__ __forceinline__ ExcludedColumns(const TopKStatisticsParams& params, int64_t i, int64_t window,
                                             const typename Storage<type>::Element* row) {
    __shared__ uint32_t words[kWordsOfBits];
    bits = words;
    before = int(reinterpret_cast<uintptr_t>(row) / sizeof(*row) % kLanes);
    __syncthreads();  // those of the last window have been read by all
    for (int word = threadIdx.x; word < kWordsOfBits; word += kThreads) words[word] = 0;
    __syncthreads();
    for (int64_t j = threadIdx.x; j < params.tokens.k; j += kThreads) {
      const int64_t column = own_column(params.tokens, params.logits.columns, i, j);
      if (column < window || column >= window + kWindow) continue;
      const int bit = int(column - window) + before;
      atomicOr(&words[bit / 32], 1u << (bit % 32));
    }
    __syncthreads();
  }

  // Of the pack that starts at `first`: one bit a lane.
  __device__ __forceinline__ uint32_t of_pack(int first) const {
    const int bit = first + before;
    return bits[bit / 32] >> (bit % 32) & ((1u << kLanes) - 1);
  }
};

template <FloatType type, bool kUntempered>
__device__ __forceinline__ PartSums sum_others(const TopKStatisticsParams& params, int64_t i, const Team& team) {
  constexpr int kLanes = Walk<type>::kLanes;
  const auto* row = student_row<type>(params.logits, i);
  RunningSum others;
  for (int64_t window = 0; window < params.logits.columns; window += kWindow) {
    const ExcludedColumns<type> excluded(params, i, window, row + window);
    const int64_t rest = params.logits.columns - window;
    const Walk<type> walk(row + window, rest < kWindow ? rest : kWindow, true);
    walk.template for_each<kBatch>({row + window}, [&](int first, const Pack(&packs)[1], auto) {
      float z[kLanes];
      widen<type>(packs[0], z);
      const uint32_t bits = excluded.of_pack(first);
      if (bits != 0) {
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) z[lane] = bits >> lane & 1 ? float(kNone) : z[lane];
      }
      float most = z[0];
#pragma unroll
      for (int lane = 1; lane < kLanes; ++lane) most = fmaxf(most, z[lane]);
      others.raise(most, params.scale);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) others.template add<kUntempered>(z[lane], params.scale);
    });
  }
  return others.total(params.scale, kUntempered, team);
}

template <FloatType type, bool kOthers, bool kUntempered>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    top_k_statistics_kernel(const __grid_constant__ TopKStatisticsParams params) {
  const int64_t i = blockIdx.x;
  const Team team;
  const auto* row = student_row<type>(params.logits, i);
  const PartSums top = sum_tokens<Reader<type>>(params, i, row, team);
  PartSums others = {kNone, 0, 0};
  if constexpr (kOthers) others = sum_others<type, kUntempered>(params, i, team);
  if (threadIdx.x == 0) write_statistics<Reader<type>>(params, i, row, top, others);
}

template <FloatType type>
__global__ void __launch_bounds__(kThreads, 1) top_k_sums_kernel(const __grid_constant__ TopKSumsParams params) {
  const int64_t i = blockIdx.x;
  sums_row<Reader<type>>(params, i, student_row<type>(params.logits, i), Team());
}

__global__ void __launch_bounds__(kThreads, 1) top_k_merge_kernel(const __grid_constant__ TopKMergeParams params) {
  merge_row(params, blockIdx.x, Team());
}

__global__ void __launch_bounds__(kThreads, 1) top_k_combine_kernel(const __grid_constant__ TopKCombineParams params) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row < params.rows) combine_row(params, row);
}

}  // namespace

void top_k_statistics(const TopKStatisticsParams& params, void* stream) {
  const int64_t rows = params.logits.rows;
  GKD_TYPE_SWITCH(params.logits.type, [&] {
    if (params.columns == kTopColumns) {
      return launch(top_k_statistics_kernel<kType, false, false>, rows, stream, params);
    }
    GKD_BOOL_SWITCH(params.columns == kLabelColumns, kUntempered,
                    [&] { launch(top_k_statistics_kernel<kType, true, kUntempered>, rows, stream, params); });
  });
}

void top_k_sums(const TopKSumsParams& params, void* stream) {
  GKD_TYPE_SWITCH(params.logits.type, [&] { launch(top_k_sums_kernel<kType>, params.logits.rows, stream, params); });
}

void top_k_combine(const TopKCombineParams& params, void* stream) {
  launch(top_k_combine_kernel, (params.rows + kThreads - 1) / kThreads, stream, params);
}

void top_k_merge(const TopKMergeParams& params, void* stream) {
  launch(top_k_merge_kernel, params.rows, stream, params);
}

}  // namespace gkd::cuda
