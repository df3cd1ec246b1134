// A block's share of a row of both models, held in shared memory from its first use to its last.
//
// A thread copies its own packs and is the only one that reads them, so there is no barrier between copy and use. The
// copies are asynchronous, in a few groups: a row's first group can be used while its others are under way, and while
// the gradient of one row is written, the next row takes its place pack by pack.

#pragma once

#include <cuda_pipeline.h>

#include "walk.cuh"

namespace gkd::cuda {

constexpr int kClusterThreads = 512;

template <FloatType type>
class HeldRow {
 public:
  using RowWalk = Walk<type, kClusterThreads>;
  using Element = typename RowWalk::Element;
  static constexpr int kGroups = 4;

  // Bytes of shared memory for a share of `columns`.
  static constexpr int64_t bytes(int64_t columns) { return steps(columns) * 2 * kClusterThreads * int(sizeof(Pack)); }

  __device__ __forceinline__ HeldRow(void* memory, const Logits& logits, const Share& share, bool alike)
      : packs_(static_cast<Pack*>(memory) + threadIdx.x),
        logits_(logits),
        share_(share),
        alike_(alike),
        steps_(int(steps(share.columns))),
        steps_of_group_((steps_ + kGroups - 1) / kGroups) {}

  __device__ __forceinline__ RowWalk walk(int64_t row) const {
    return RowWalk(student_row<type>(logits_, row), logits_.columns, alike_, share_);
  }

  // Starts the copies of a whole row.
  __device__ __forceinline__ void start(int64_t row) {
    const Source source(*this, row);
    for (int group = 0; group < kGroups; ++group) {
      for_steps(group, [&](int step) { start_step(source, step); });
      __pipeline_commit();
    }
  }

  // body(first, packs) for each of this thread's packs, in the order of their columns. `kWaits`: as the copies arrive.
  template <bool kWaits, class Body>
  __device__ __forceinline__ void for_each(const RowWalk& walk, const Body& body) const {
    for (int group = 0; group < kGroups; ++group) {
      if constexpr (kWaits) wait(group);
      for_steps(group, [&](int step) {
        const int first = walk.begin + step * RowWalk::kStride;
        if (first < walk.columns) body(first, at(step));
      });
    }
  }

  // The same for the last time. Each pack's place is then taken by that of row `next`, if there is one.
  template <class Body>
  __device__ __forceinline__ void for_each_then_start(const RowWalk& walk, int64_t next, const Body& body) {
    const bool has_next = next < logits_.rows;
    const Source source(*this, has_next ? next : 0);
    for (int group = 0; group < kGroups; ++group) {
      for_steps(group, [&](int step) {
        const int first = walk.begin + step * RowWalk::kStride;
        if (first < walk.columns) body(first, at(step));
        if (has_next) start_step(source, step);
      });
      __pipeline_commit();
    }
  }

  // One of this thread's logits of one model.
  __device__ __forceinline__ float logit(const RowWalk& walk, int model, int column) const {
    const int from_begin = column - walk.begin, in_step = from_begin % RowWalk::kStride;
    const int lane = alike_ ? in_step : in_step / kClusterThreads;
    return read_one<type>(reinterpret_cast<const Element*>(place(from_begin / RowWalk::kStride, model)) + lane);
  }

  // The pack of one model that starts at column `first`, one of this thread's.
  __device__ __forceinline__ Pack pack(const RowWalk& walk, int model, int first) const {
    return *place((first - walk.begin) / RowWalk::kStride, model);
  }

 private:
  struct Source {
    const Element* rows[2];
    RowWalk walk;

    __device__ __forceinline__ Source(const HeldRow& held, int64_t row)
        : rows{student_row<type>(held.logits_, row), teacher_row<type>(held.logits_, row)}, walk(held.walk(row)) {}
  };
  struct Packs {
    Pack of_model[2];
  };

  static constexpr __host__ __device__ int64_t steps(int64_t columns) {
    return (columns + RowWalk::kStride - 1) / RowWalk::kStride;
  }

  __device__ __forceinline__ Pack* place(int step, int model) const {
    return packs_ + (step * 2 + model) * kClusterThreads;
  }
  __device__ __forceinline__ Packs at(int step) const { return {{*place(step, 0), *place(step, 1)}}; }

  template <class Body>
  __device__ __forceinline__ void for_steps(int group, const Body& body) const {
    const int end = min(steps_, (group + 1) * steps_of_group_);
    for (int step = group * steps_of_group_; step < end; ++step) body(step);
  }

  __device__ __forceinline__ void start_step(const Source& source, int step) const {
    const int first = source.walk.begin + step * RowWalk::kStride;
    if (first >= source.walk.columns) return;
#pragma unroll
    for (int model = 0; model < 2; ++model) {
      if (source.walk.is_whole(first)) {
        __pipeline_memcpy_async(place(step, model), source.rows[model] + first, sizeof(Pack));
      } else {
        *place(step, model) = source.walk.gather(source.rows[model], first);
      }
    }
  }

  // Until this thread's copies of a row's groups up to this one have arrived; no others have been started since.
  static __device__ __forceinline__ void wait(int group) {
    static_assert(kGroups == 4);
    if (group == 0) __pipeline_wait_prior(3);
    if (group == 1) __pipeline_wait_prior(2);
    if (group == 2) __pipeline_wait_prior(1);
    if (group == 3) __pipeline_wait_prior(0);
  }

  Pack* packs_;  // of this thread: [steps, 2, kClusterThreads]
  const Logits& logits_;
  Share share_;
  bool alike_;
  int steps_, steps_of_group_;
};

}  // namespace gkd::cuda
