// A stand-in for CUDA's header, with what the kernels of csrc/cuda use: g++ compiles them as they are, and they run on a
// CPU.
//
// Clusters of blocks run one after another, so that the __shared__ variables of a kernel without clusters can be plain
// static ones. In a cluster of several blocks, only dynamic shared memory is each block's own. Threads are fibers. Each
// block of a cluster runs as far as it can before the next one starts, and so does each warp of a block, from the first
// to the last or the other way: two orders as far apart as can be, between which a missing barrier shows. The emulator
// fails where CUDA would hang or is undefined: threads that miss a barrier or shuffle, wait at different ones, use a
// misaligned address, or reach for the memory of a block that may not be there.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace cuda_emulator {

template <class T>
void check_alignment(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(T) != 0) {
    Cluster::instance().fail_in_thread("a misaligned address");
  }
}

template <class To, class From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace cuda_emulator

#define __syncthreads() cuda_emulator::Cluster::instance().wait_at_barrier(__LINE__)

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  if (mask != 0xFFFFFFFFu) cuda_emulator::Cluster::instance().fail_in_thread("a shuffle of a part of a warp");
  const auto bits = cuda_emulator::bit_cast<uint32_t>(value);
  return cuda_emulator::bit_cast<T>(cuda_emulator::Cluster::instance().shuffle_xor(bits, lane_mask));
}

template <class T>
T __ldcs(const T* from) {
  cuda_emulator::check_alignment(from);
  return *from;
}

template <class T>
void __stcs(T* to, T value) {
  cuda_emulator::check_alignment(to);
  *to = value;
}

// Threads run one at a time.
template <class T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}
template <class T>
T atomicOr(T* to, T value) {
  const T before = *to;
  *to |= value;
  return before;
}

inline float __uint_as_float(uint32_t bits) { return cuda_emulator::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float x) { return cuda_emulator::bit_cast<uint32_t>(x); }
inline int min(int a, int b) { return std::min(a, b); }

#include "launch.h"
