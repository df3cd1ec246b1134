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
#include <type_traits>

#include "../params.h"
#include "storage.cuh"

namespace gkd::cuda {

constexpr int kThreads = 256;
constexpr int kBatch = 2;  // packs of each tensor that a thread loads before it uses the first
// An accurate form computes so long on a pack that registers are worth more than a second one.
template <class Form>
constexpr int kBatchOf = Form::kFast ? kBatch : 1;
// Least blocks on a multiprocessor, which leaves 64 registers to a thread: enough packs are then under way to keep the
// memory busy while others are worked on.
constexpr int kBlocksPerMultiprocessor = 4;

// Which part of each row a block takes where several share one: the `index`-th `columns`, a multiple of 8.
struct Share {
  int index = 0;
  int columns = 0;
};

template <FloatType type, int threads = kThreads>
struct Walk {
  using Element = typename Storage<type>::Element;
  static constexpr int kPerWord = Storage<type>::kPerWord;
  static constexpr int kLanes = kWords * kPerWord;
  static constexpr int kStride = threads * kLanes;  // columns from a thread's pack to its next

  int columns;  // up to the end of this block's share
  int begin;    // the column where this thread's first pack starts; negative for one that sticks out
  bool alike;
  int whole;  // packs that start at 0 to whole - 1 are one 16-byte access

  // `alike`: the tensors' rows lie alike modulo 16 bytes; `row` is any of them.
  __device__ __forceinline__ Walk(const Element* row, int64_t columns, bool alike)
      : columns(int(columns)), alike(alike) {
    const int before = int(reinterpret_cast<uintptr_t>(row) / sizeof(Element) % kLanes);
    begin = alike ? int(threadIdx.x) * kLanes - before : int(threadIdx.x);
    whole = alike && columns >= kLanes ? int(columns) - kLanes + 1 : 0;
  }

  // Of a part of the row. Parts end between two packs.
  __device__ __forceinline__ Walk(const Element* row, int64_t row_columns, bool alike, const Share& share)
      : Walk(row, row_columns, alike) {
    const int start = share.index * share.columns;
    const int before = alike ? int(threadIdx.x) * kLanes - begin : 0;
    begin += start;
    columns = min(columns, start + share.columns - before);
    whole = alike && columns >= kLanes ? columns - kLanes + 1 : 0;
  }

  __device__ __forceinline__ bool is_whole(int first) const { return unsigned(first) < unsigned(whole); }
  __device__ __forceinline__ int column(int first, int lane) const { return first + lane * (alike ? 1 : threads); }
  __device__ __forceinline__ bool holds(int column) const { return unsigned(column) < unsigned(columns); }

  // Whether this thread has a column of the row.
  __device__ __forceinline__ bool is_mine(int column) const {
    if (column < 0 || column < begin || column >= columns) return false;
    return alike ? unsigned(column - begin) % kStride < unsigned(kLanes) : unsigned(column - begin) % threads == 0;
  }

  template <int n>
  __device__ __forceinline__ void load_whole(const Element* const (&rows)[n], int first, Pack (&packs)[n]) const {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const uint4 words = __ldcs(reinterpret_cast<const uint4*>(rows[i] + first));
      packs[i] = {{words.x, words.y, words.z, words.w}};
    }
  }

  // The packs of n tensors that start at column `first`; -inf where they stick out of the row.
  template <int n>
  __device__ __forceinline__ void load(const Element* const (&rows)[n], int first, Pack (&packs)[n]) const {
    if (is_whole(first)) return load_whole(rows, first, packs);
#pragma unroll
    for (int i = 0; i < n; ++i) packs[i] = gather(rows[i], first);
  }

  __device__ __forceinline__ void store(Element* row, int first, const Pack& pack, std::true_type /*is_whole*/) const {
    __stcs(reinterpret_cast<uint4*>(row + first), make_uint4(pack.word[0], pack.word[1], pack.word[2], pack.word[3]));
  }

  __device__ __forceinline__ void store(Element* row, int first, const Pack& pack, std::false_type = {}) const {
    if (is_whole(first)) return store(row, first, pack, std::true_type());
#pragma unroll
    for (int k = 0; k < kLanes; ++k) {
      if (holds(column(first, k))) row[column(first, k)] = Element(pack.word[k / kPerWord] >> shift(k));
    }
  }

  // A pack element by element.
  __device__ __forceinline__ Pack gather(const Element* row, int first) const {
    Pack pack = {};
#pragma unroll
    for (int k = 0; k < kLanes; ++k) {
      const Element bits = holds(column(first, k)) ? row[column(first, k)] : Storage<type>::kMinusInfinity;
      pack.word[k / kPerWord] |= uint32_t(bits) << shift(k);
    }
    return pack;
  }

  // body(first, packs, is_whole) for each of this thread's packs, in the order of their columns; `is_whole` is a constant
  // that is true only for packs that are one 16-byte access. The loop over batches of packs that are whole asks nothing
  // else; what is left is the first and the last pack of a row, a batch that is not full, and all packs where the tensors
  // lie differently.
  template <int batch, int n, class Body>
  __device__ __forceinline__ void for_each(const Element* const (&rows)[n], const Body& body) const {
    constexpr int kRest = (batch - 1) * kStride;
    const unsigned batches = whole > kRest ? whole - kRest : 0;  // starts of packs whose successors are whole, too
    int first = begin;
    while (first < columns) {
      for (; unsigned(first) < batches; first += batch * kStride) {
        Pack packs[batch][n];
#pragma unroll
        for (int b = 0; b < batch; ++b) load_whole(rows, first + b * kStride, packs[b]);
#pragma unroll
        for (int b = 0; b < batch; ++b) body(first + b * kStride, packs[b], std::true_type());
      }
      if (first >= columns) return;
      Pack packs[n];
      load(rows, first, packs);
      body(first, packs, std::false_type());
      first += kStride;
    }
  }

 private:
  static constexpr __device__ int shift(int lane) { return lane % kPerWord * 8 * int(sizeof(Element)); }
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

template <FloatType type>
__device__ __forceinline__ float read_one(const typename Storage<type>::Element* from) {
  float z[Storage<type>::kPerWord];
  Storage<type>::widen(*from, z);
  return z[0];
}

template <FloatType type>
__device__ __forceinline__ void write_one(typename Storage<type>::Element* to, float x) {
  float z[Storage<type>::kPerWord] = {};
  z[0] = x;
  *to = typename Storage<type>::Element(Storage<type>::narrow(z));
}

}  // namespace gkd::cuda
