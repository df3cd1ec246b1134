// What the passes over a top-k share on a GPU: a block as a team, one logit, and sums that follow a maximum.

#pragma once

#include <cuda_runtime.h>

#include "../divergences.h"
#include "../top_k_rows.h"
#include "walk.cuh"

namespace gkd::cuda {
namespace {

// The threads of a block. Results do not depend on timing: partial results are combined pairwise, by thread.
struct Team {
  int64_t rank;
  static constexpr int64_t size = kThreads;

  __device__ __forceinline__ Team() : rank(threadIdx.x) {}
  __device__ __forceinline__ double largest(double x) const {
    return reduce(x, [](double a, double b) { return larger(a, b); });
  }
  __device__ __forceinline__ double total(double x) const {
    return reduce(x, [](double a, double b) { return a + b; });
  }

 private:
  template <class Combine>
  static __device__ __forceinline__ double reduce(double x, Combine combine) {
    __shared__ double of_thread[kThreads];
    __syncthreads();  // an earlier call's result has been read by all
    of_thread[threadIdx.x] = x;
    for (int half = kThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (int(threadIdx.x) < half) {
        of_thread[threadIdx.x] = combine(of_thread[threadIdx.x], of_thread[threadIdx.x + half]);
      }
    }
    __syncthreads();
    return of_thread[0];
  }
};

template <FloatType type>
struct Reader {
  using Element = typename Storage<type>::Element;

  static __device__ __forceinline__ float read(const Element* row, int64_t column) {
    float z[Storage<type>::kPerWord];
    Storage<type>::widen(row[column], z);
    return z[0];
  }
  static __device__ __forceinline__ void write(Element* row, int64_t column, float x) {
    const float z[Storage<type>::kPerWord] = {x};
    row[column] = Element(Storage<type>::narrow(z));
  }
};

constexpr float kSlackBits = 8;  // how far terms may exceed 1 before the reference follows the maximum

// Sums over the columns that one thread has read, relative to a logit not far below the maximum, or 0 without one.
struct RunningSum {
  float maximum = float(kNone);
  float reference = 0;
  float bound = float(kNone);  // a logit above this moves the reference
  float sum = 0, untempered = 0;

  __device__ __forceinline__ void move_reference(float to, float scale) {
    const float shift = at_least(reference - to, kImpossible);
    if (sum != 0) sum *= exp2(shift * scale);
    if (untempered != 0) untempered *= exp2(shift * kLog2E);
    reference = to;
  }

  __device__ __forceinline__ void raise(float candidate, float scale) {
    maximum = fmaxf(maximum, candidate);
    if (!(candidate > bound)) return;
    bound = candidate + kSlackBits / fmaxf(scale, kLog2E);
    move_reference(candidate, scale);
  }

  // After `raise` to at least this logit.
  template <bool kUntempered>
  __device__ __forceinline__ void add(float z, float scale) {
    sum += exp2((z - reference) * scale);
    if constexpr (kUntempered) untempered += exp2((z - reference) * kLog2E);
  }

  // Over all threads, relative to the maximum of all.
  __device__ __forceinline__ PartSums total(float scale, bool with_untempered, const Team& team) {
    const double most = team.largest(maximum);
    move_reference(float(finite(most)), scale);
    const double all = team.total(sum);
    return {most, all, with_untempered ? team.total(untempered) : 0.0};
  }
};

}  // namespace
}  // namespace gkd::cuda
