// A stand-in for CUDA's header, with what the kernels of csrc/cuda use: g++ compiles them as they are, and they run on a
// CPU.
//
// Blocks run one after another, so that a kernel's __shared__ variables can be plain static ones. A block's threads are
// fibers. Each warp runs as far as it can before the next one starts, from the first to the last or the other way: two
// orders as far apart as can be, between which a missing barrier shows. The emulator fails where CUDA would hang or is
// undefined: threads that miss a barrier or shuffle, wait at different ones, or use a misaligned address.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_emulator {

constexpr int kWarp = 32;
constexpr std::size_t kStack = 256 * 1024;

inline bool reverse_order = false;  // a block's warps, and a warp's threads, run from the last to the first

enum class State { runnable, at_barrier, in_shuffle, done };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::done;
  int line = 0;  // of the barrier that it waits at
  uint32_t shuffled = 0;
  int lane_mask = 0;
};

class Block {
 public:
  static Block& instance() {
    static Block block;
    return block;
  }

  // One block of `count` threads, each of which calls `body`. Throws std::runtime_error for what CUDA does not allow.
  void run(int count, const std::function<void()>& body) {
    if (count % kWarp != 0) fail("the emulator runs whole warps only");
    body_ = &body;
    error_.clear();
    while (int(threads_.size()) < count) threads_.push_back(std::make_unique<Thread>());
    count_ = count;
    for (int i = 0; i < count; ++i) start(*threads_[i]);
    while (!all(0, count, State::done)) {
      for (int begin = 0; begin < count; begin += kWarp) run_warp(reverse_order ? count - kWarp - begin : begin);
      release_barrier();
      if (!any_runnable(0, count) && !all(0, count, State::done)) {
        fail("a barrier or shuffle is not reached by all threads");
      }
    }
  }

  void wait_at_barrier(int line) {
    current().line = line;
    leave(State::at_barrier);
  }

  uint32_t shuffle_xor(uint32_t bits, int lane_mask) {
    current().shuffled = bits;
    current().lane_mask = lane_mask;
    leave(State::in_shuffle);
    return current().shuffled;
  }

  // Ends the block, from inside one of its threads.
  void fail_in_thread(const char* error) {
    error_ = error;
    leave(State::done);
  }

 private:
  Thread& current() { return *threads_[current_]; }

  void start(Thread& thread) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, &Block::enter, 0);
    thread.state = State::runnable;
  }

  static void enter() {
    (*instance().body_)();
    instance().leave(State::done);
  }

  void leave(State state) {
    current().state = state;
    swapcontext(&current().context, &scheduler_);
  }

  void run_warp(int begin) {
    while (any_runnable(begin, begin + kWarp)) {
      for (int i = 0; i < kWarp; ++i) resume(begin + (reverse_order ? kWarp - 1 - i : i));
      exchange(begin);
    }
  }

  void resume(int i) {
    if (threads_[i]->state != State::runnable) return;
    current_ = i;
    threadIdx = dim3(i, 0, 0);
    swapcontext(&scheduler_, &threads_[i]->context);
    if (!error_.empty()) fail(error_);
  }

  bool all(int begin, int end, State state) const {
    return std::all_of(&threads_[begin], &threads_[begin] + (end - begin),
                       [&](const auto& thread) { return thread->state == state; });
  }

  bool any_runnable(int begin, int end) const {
    return std::any_of(&threads_[begin], &threads_[begin] + (end - begin),
                       [](const auto& thread) { return thread->state == State::runnable; });
  }

  // The shuffle of the warp that starts at thread `begin`, once all its threads are there.
  void exchange(int begin) {
    if (!all(begin, begin + kWarp, State::in_shuffle)) return;
    uint32_t posted[kWarp];
    for (int i = 0; i < kWarp; ++i) posted[i] = threads_[begin + i]->shuffled;
    for (int i = 0; i < kWarp; ++i) {
      Thread& thread = *threads_[begin + i];
      if (thread.lane_mask != threads_[begin]->lane_mask) fail("a warp's threads are in different shuffles");
      thread.shuffled = posted[i ^ thread.lane_mask];
      thread.state = State::runnable;
    }
  }

  void release_barrier() {
    if (!all(0, count_, State::at_barrier)) return;
    for (int i = 0; i < count_; ++i) {
      if (threads_[i]->line != threads_[0]->line) fail("a block's threads are at different barriers");
      threads_[i]->state = State::runnable;
    }
  }

  [[noreturn]] void fail(const std::string& error) { throw std::runtime_error(error); }

  std::vector<std::unique_ptr<Thread>> threads_;
  const std::function<void()>* body_ = nullptr;
  ucontext_t scheduler_;
  std::string error_;
  int count_ = 0, current_ = 0;
};

template <class T>
void check_alignment(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(T) != 0) Block::instance().fail_in_thread("a misaligned address");
}

template <class To, class From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace cuda_emulator

#define __syncthreads() cuda_emulator::Block::instance().wait_at_barrier(__LINE__)

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  if (mask != 0xFFFFFFFFu) cuda_emulator::Block::instance().fail_in_thread("a shuffle of a part of a warp");
  const auto bits = cuda_emulator::bit_cast<uint32_t>(value);
  return cuda_emulator::bit_cast<T>(cuda_emulator::Block::instance().shuffle_xor(bits, lane_mask));
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

inline float __uint_as_float(uint32_t bits) { return cuda_emulator::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float x) { return cuda_emulator::bit_cast<uint32_t>(x); }
inline int min(int a, int b) { return std::min(a, b); }

using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... Expected, class... Actual>
int cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (unsigned i = 0; i < config->gridDim.x; ++i) {
    blockIdx = dim3(i, 0, 0);
    cuda_emulator::Block::instance().run(int(config->blockDim.x), [&] { kernel(arguments...); });
  }
  return 0;
}
