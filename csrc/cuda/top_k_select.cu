// The k largest logits of a row on a GPU: a block takes a row, and reads it twice.
//
// The first read takes each thread's maximum: their k-th is reached by at least k columns. The second one collects the
// columns that reach it in shared memory, and sums up the others. Where these are too many (many equal logits, or rows
// that one thread's columns dominate), a radix select over the bits of candidates raises the bound, and the row is read
// once more for each 8 bits of it. Candidates differ by their column, so a bound always ends it. Collected in any order,
// they are sorted, so that the result does not depend on timing.

#include "../switches.h"
#include "launch.cuh"
#include "top_k.cuh"
#include "top_k.h"

namespace gkd::cuda {
namespace {

constexpr int kCapacity = 2 * kMostPlaces;  // candidates in shared memory
constexpr int kBins = 256;                  // of one radix pass

struct Shared {
  uint64_t candidates[kCapacity];
  int histogram[kBins];
  int count;
  int above;       // candidates above the bin that holds the k-th
  uint64_t bound;  // those from here on are collected
  bool done;
};

// Sorts `count` candidates, a power of two, from the largest to the smallest.
__device__ __forceinline__ void sort(uint64_t* candidates, int count) {
  for (int size = 2; size <= count; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < count; i += kThreads) {
        const int other = i ^ stride;
        if (other <= i) continue;
        const uint64_t a = candidates[i], b = candidates[other];
        if ((a < b) == ((i & size) == 0)) {
          candidates[i] = b;
          candidates[other] = a;
        }
      }
    }
  }
  __syncthreads();
}

// body(z, column) for each logit of the row that this thread reads.
template <FloatType type, class Body>
__device__ __forceinline__ void for_each_logit(const Walk<type>& walk, const typename Storage<type>::Element* row,
                                               const Body& body) {
  walk.template for_each<kBatch>({row}, [&](int first, const Pack(&packs)[1], auto) {
    float z[Walk<type>::kLanes];
    widen<type>(packs[0], z);
#pragma unroll
    for (int lane = 0; lane < Walk<type>::kLanes; ++lane) {
      const int column = walk.column(first, lane);
      if (walk.holds(column)) body(z[lane], column);
    }
  });
}

template <FloatType type>
__device__ __forceinline__ uint64_t bound_by_maxima(const Walk<type>& walk, const typename Storage<type>::Element* row,
                                                    int64_t k, Shared& shared) {
  if (k > kThreads) return 0;
  float most = float(kNone);  // NaN does not count, which only lowers the bound
  walk.template for_each<kBatch>(
      {row}, [&](int, const Pack(&packs)[1], auto) { most = fmaxf(most, Storage<type>::maximum(packs[0])); });
  shared.candidates[threadIdx.x] = uint64_t(order_of(most)) << 32;
  sort(shared.candidates, kThreads);
  return shared.candidates[k - 1];
}

// The highest bound, in steps of 8 bits, that the k-th candidate reaches and at most kCapacity do.
template <FloatType type>
__device__ __forceinline__ uint64_t bound_by_radix(const Walk<type>& walk, const typename Storage<type>::Element* row,
                                                   int64_t k, Shared& shared) {
  uint64_t prefix = 0;
  if (threadIdx.x == 0) shared.above = 0;
  for (int shift = 56;; shift -= 8) {
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) shared.histogram[bin] = 0;
    __syncthreads();
    for_each_logit(walk, row, [&](float z, int column) {
      const uint64_t candidate = pack_candidate(z, uint32_t(column));
      if (shift == 56 || candidate >> (shift + 8) == prefix) atomicAdd(&shared.histogram[candidate >> shift & 255], 1);
    });
    __syncthreads();
    if (threadIdx.x == 0) {
      int bin = kBins - 1;
      while (shared.above + shared.histogram[bin] < k) shared.above += shared.histogram[bin--];
      shared.bound = (prefix << 8 | uint64_t(bin)) << shift;
      shared.done = shared.above + shared.histogram[bin] <= kCapacity;
    }
    __syncthreads();
    prefix = shared.bound >> shift;
    if (shared.done) return shared.bound;
  }
}

// Collects the candidates from `bound` on, as far as there is room, and sums up the others. Returns how many there are.
template <FloatType type, bool kTail>
__device__ __forceinline__ int collect(const TopKSelectParams& params, const Walk<type>& walk,
                                       const typename Storage<type>::Element* row, uint64_t bound, Shared& shared,
                                       RunningSum& others) {
  constexpr int kLanes = Walk<type>::kLanes;
  const float lowest = logit_of(order_of(bound));  // below it no logit is a candidate
  __syncthreads();
  if (threadIdx.x == 0) shared.count = 0;
  __syncthreads();
  walk.template for_each<kBatch>({row}, [&](int first, const Pack(&packs)[1], auto) {
    float z[kLanes];
    widen<type>(packs[0], z);
    float most = float(kNone);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(z[lane] < lowest) && walk.holds(walk.column(first, lane))) {
        const uint64_t candidate = pack_candidate(z[lane], uint32_t(walk.column(first, lane)));
        if (candidate >= bound) {
          const int place = atomicAdd(&shared.count, 1);
          if (place < kCapacity) shared.candidates[place] = candidate;
          z[lane] = float(kNone);
        }
      }
      most = fmaxf(most, z[lane]);
    }
    if constexpr (kTail) {
      others.raise(most, params.scale);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) others.template add<false>(z[lane], params.scale);
    }
  });
  __syncthreads();
  return shared.count;
}

template <FloatType type, bool kTail>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    top_k_select_kernel(const __grid_constant__ TopKSelectParams params) {
  __shared__ Shared shared;
  const int64_t i = blockIdx.x, columns = params.logits.columns, words = candidate_words(params.k, kTail);
  const int found = int(params.k < columns ? params.k : columns);
  int32_t* values = params.out + i * words;
  int32_t* ids = values + words - params.k;
  const auto* row = student_row<type>(params.logits, i);
  const Walk<type> walk(row, columns, true);
  RunningSum others;
  int count = 0;
  if (found > 0) {
    count = collect<type, kTail>(params, walk, row, bound_by_maxima(walk, row, found, shared), shared, others);
    if (count > kCapacity) {
      others = RunningSum();
      count = collect<type, kTail>(params, walk, row, bound_by_radix(walk, row, found, shared), shared, others);
    }
    int padded = 1;
    while (padded < count) padded *= 2;
    for (int j = count + int(threadIdx.x); j < padded; j += kThreads) shared.candidates[j] = 0;
    sort(shared.candidates, padded);
  }
  for (int j = threadIdx.x; j < params.k; j += kThreads) {
    const bool there = j < found;
    values[j] = Lanes<float>::bits(there ? logit_of(order_of(shared.candidates[j])) : float(kNone));
    ids[j] = there ? int32_t(params.first + column_of(shared.candidates[j])) : int32_t(kMissing);
  }
  if constexpr (kTail) {
    for (int j = found + int(threadIdx.x); j < count; j += kThreads) {
      const float z = logit_of(order_of(shared.candidates[j]));
      others.raise(z, params.scale);
      others.template add<false>(z, params.scale);
    }
    const PartSums total = others.total(params.scale, false, Team());
    if (threadIdx.x != 0) return;
    values[params.k] = Lanes<float>::bits(float(total.maximum));
    values[params.k + 1] = Lanes<float>::bits(float(total.sum));
  }
}

}  // namespace

void top_k_select(const TopKSelectParams& params, void* stream) {
  GKD_TYPE_SWITCH(params.logits.type, [&] {
    GKD_BOOL_SWITCH(params.scale != 0, kTail,
                    [&] { launch(top_k_select_kernel<kType, kTail>, params.logits.rows, stream, params); });
  });
}

}  // namespace gkd::cuda
