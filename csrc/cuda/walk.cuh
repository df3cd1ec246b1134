// How a block of threads walks along a row: each thread takes packs of 16 bytes, two at a time.
//
// Where all tensors of a row lie alike modulo 16 bytes, a pack is 16 bytes between two multiples of 16: one load, one
// store. Only the first and the last pack of a row may stick out of it, and are then taken element by element. Where
// the tensors lie differently, every pack is taken element by element, and its elements are `kThreads` columns apart, so
// that adjacent threads read adjacent elements. Which of the two is decided at run time: it costs one comparison
// a pack. Either way a thread's packs, and the elements of a pack, are in the order of their columns, and an element
// belongs to the same thread in every tensor.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../params.h"
#include "storage.cuh"

namespace gkd::cuda {

constexpr int kThreads = 256;
constexpr int kBatch = 2;  // packs of each tensor that a thread loads before it uses the first
// Least blocks on a multiprocessor, which leaves 64 registers to a thread: enough packs are then under way to keep the
// memory busy while others are worked on.
constexpr int kBlocksPerMultiprocessor = 4;

template <FloatType type>
struct Walk {
  using Element = typename Storage<type>::Element;
  static constexpr int kPerWord = Storage<type>::kPerWord;
  static constexpr int kLanes = kWords * kPerWord;
  static constexpr int kStride = kThreads * kLanes;  // columns from a thread's pack to its next

  int columns;
  int begin;  // the column where this thread's first pack starts; negative for one that sticks out
  int step;   // columns between two elements of a pack
  int whole;  // packs that start at 0 to whole - 1 are one 16-byte access

  // `alike`: the tensors' rows lie alike modulo 16 bytes; `row` is any of them.
  __device__ __forceinline__ Walk(const Element* row, int64_t columns, bool alike) : columns(int(columns)) {
    const int before = int(reinterpret_cast<uintptr_t>(row) / sizeof(Element) % kLanes);
    begin = alike ? int(threadIdx.x) * kLanes - before : int(threadIdx.x);
    step = alike ? 1 : kThreads;
    whole = alike && columns >= kLanes ? int(columns) - kLanes + 1 : 0;
  }

  __device__ __forceinline__ bool is_whole(int first) const { return unsigned(first) < unsigned(whole); }
  __device__ __forceinline__ int column(int first, int lane) const { return first + lane * step; }
  __device__ __forceinline__ bool holds(int column) const { return unsigned(column) < unsigned(columns); }

  // The packs of n tensors that start at column `first`; -inf where they stick out of the row.
  template <int n>
  __device__ __forceinline__ void load(const Element* const (&rows)[n], int first, Pack (&packs)[n]) const {
    if (is_whole(first)) {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const uint4 words = __ldcs(reinterpret_cast<const uint4*>(rows[i] + first));
        packs[i] = {{words.x, words.y, words.z, words.w}};
      }
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) packs[i] = gather(rows[i], first);
    }
  }

  __device__ __forceinline__ void store(Element* row, int first, const Pack& pack) const {
    if (is_whole(first)) {
      __stcs(reinterpret_cast<uint4*>(row + first), make_uint4(pack.word[0], pack.word[1], pack.word[2], pack.word[3]));
      return;
    }
#pragma unroll
    for (int k = 0; k < kLanes; ++k) {
      if (holds(column(first, k))) row[column(first, k)] = Element(pack.word[k / kPerWord] >> shift(k));
    }
  }

  // body(first, packs) for each of this thread's packs, in the order of their columns.
  template <int n, class Body>
  __device__ __forceinline__ void for_each(const Element* const (&rows)[n], const Body& body) const {
    for (int first = begin; first < columns; first += kBatch * kStride) {
      Pack packs[kBatch][n];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) load(rows, first + b * kStride, packs[b]);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (first + b * kStride < columns) body(first + b * kStride, packs[b]);
      }
    }
  }

 private:
  static constexpr __device__ int shift(int lane) { return lane % kPerWord * 8 * int(sizeof(Element)); }

  __device__ __forceinline__ Pack gather(const Element* row, int first) const {
    Pack pack = {};
#pragma unroll
    for (int k = 0; k < kLanes; ++k) {
      const Element bits = holds(column(first, k)) ? row[column(first, k)] : Storage<type>::kMinusInfinity;
      pack.word[k / kPerWord] |= uint32_t(bits) << shift(k);
    }
    return pack;
  }
};

// Whether rows of two tensors lie alike modulo 16 bytes, all of them.
inline bool lie_alike(const void* a, int64_t a_stride, const void* b, int64_t b_stride, FloatType type) {
  const int64_t size = type == FloatType::f32 ? 4 : 2;
  const auto apart = reinterpret_cast<intptr_t>(a) - reinterpret_cast<intptr_t>(b);
  return apart % 16 == 0 && (a_stride - b_stride) * size % 16 == 0;
}

inline bool lie_alike(const Logits& logits) {
  if (!logits.has_teacher) return true;
  return lie_alike(logits.student, logits.student_stride, logits.teacher, logits.teacher_stride, logits.type);
}

template <FloatType type>
__device__ __forceinline__ const typename Storage<type>::Element* student_row(const Logits& logits, int64_t row) {
  return static_cast<const typename Storage<type>::Element*>(logits.student) + row * logits.student_stride;
}

template <FloatType type>
__device__ __forceinline__ const typename Storage<type>::Element* teacher_row(const Logits& logits, int64_t row) {
  return static_cast<const typename Storage<type>::Element*>(logits.teacher) + row * logits.teacher_stride;
}

}  // namespace gkd::cuda
