// What a cluster of thread blocks shares: its reductions, by way of distributed shared memory. Before sm_90 a cluster is
// one block.

#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace gkd::cuda {

constexpr int kMostBlocks = 8;  // of a cluster, on every device that has clusters

// The start of the block's dynamic shared memory. It holds everything that blocks of a cluster write for each other.
__device__ __forceinline__ void* dynamic_memory() {
#if defined(__CUDACC__)
  extern __shared__ uint4 memory[];
  return memory;
#else
  return cuda_emulator::Cluster::instance().dynamic_memory();
#endif
}

// Partial results of reductions of up to `kMost` values by `threads` threads a block.
template <int threads>
struct ReductionMemory {
  static constexpr int kMost = 12;
  uint32_t of_warp[threads / 32][kMost];  // bits of floats or of integers
  // Two sets in turn: a block may write the next results while another still reads the last ones. It writes into the
  // same set again after the barrier of the reduction between, by when all have read.
  uint32_t of_block[2][kMostBlocks][kMost];
};

// The same operation on every value.
template <class Operation>
struct OfAll {
  Operation operation;
  template <class T>
  __device__ __forceinline__ T operator()(int, T x, T y) const {
    return operation(x, y);
  }
};

// This thread's view of its cluster, or of a block alone. All threads of all its blocks have to make the same calls.
template <int threads>
class Cluster {
 public:
  using Memory = ReductionMemory<threads>;

  __device__ __forceinline__ explicit Cluster(Memory* memory) : memory_(memory) {
    if (blocks() > 1) sync();  // no block writes into another's memory before that block runs
  }

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  static __device__ __forceinline__ int rank() { return int(cooperative_groups::this_cluster().block_rank()); }
  static __device__ __forceinline__ int blocks() { return int(cooperative_groups::this_cluster().num_blocks()); }
#else
  static __device__ __forceinline__ int rank() { return 0; }
  static __device__ __forceinline__ int blocks() { return 1; }
#endif

  // Each of n values, combined over all threads by combine(index, x, y); every thread gets the results. The order is
  // fixed: lanes, warps, blocks.
  template <int n, class T, class Combine>
  __device__ __forceinline__ void reduce(T (&values)[n], const Combine& combine) {
    static_assert(n <= Memory::kMost && sizeof(T) == sizeof(uint32_t));
    constexpr int kWarp = 32, kWarps = threads / kWarp;
#pragma unroll
    for (int i = 0; i < n; ++i) {
#pragma unroll
      for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        values[i] = combine(i, values[i], __shfl_xor_sync(0xFFFFFFFFu, values[i], offset));
      }
    }
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int i = 0; i < n; ++i) memory_->of_warp[threadIdx.x / kWarp][i] = to_bits(values[i]);
    }
    __syncthreads();
    if (threadIdx.x < kWarp) {
      for (int index = int(threadIdx.x); index < n * blocks(); index += kWarp) {
        const int i = index % n;
        T total = from_bits<T>(memory_->of_warp[0][i]);
        for (int warp = 1; warp < kWarps; ++warp) total = combine(i, total, from_bits<T>(memory_->of_warp[warp][i]));
        *of(index / n, &memory_->of_block[turn_][rank()][i]) = to_bits(total);
      }
    }
    sync();
#pragma unroll
    for (int i = 0; i < n; ++i) {
      values[i] = from_bits<T>(memory_->of_block[turn_][0][i]);
      for (int block = 1; block < blocks(); ++block) {
        values[i] = combine(i, values[i], from_bits<T>(memory_->of_block[turn_][block][i]));
      }
    }
    turn_ ^= 1;
  }

 private:
  static __device__ __forceinline__ uint32_t to_bits(float x) { return __float_as_uint(x); }
  static __device__ __forceinline__ uint32_t to_bits(int x) { return uint32_t(x); }
  template <class T>
  static __device__ __forceinline__ T from_bits(uint32_t bits) {
    if constexpr (std::is_same_v<T, float>) return __uint_as_float(bits);
    return T(bits);
  }
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  static __device__ __forceinline__ void sync() {
    if (blocks() == 1) {
      __syncthreads();
    } else {
      cooperative_groups::this_cluster().sync();
    }
  }
  // The same place in the memory of another block.
  static __device__ __forceinline__ uint32_t* of(int block, uint32_t* here) {
    return cooperative_groups::this_cluster().map_shared_rank(here, block);
  }
#else
  static __device__ __forceinline__ void sync() { __syncthreads(); }
  static __device__ __forceinline__ uint32_t* of(int, uint32_t* here) { return here; }
#endif

  Memory* memory_;
  int turn_ = 0;
};

}  // namespace gkd::cuda
