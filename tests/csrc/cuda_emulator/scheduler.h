// Runs the blocks of a cluster, thread by thread, for cuda_runtime.h and the headers beside it.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_emulator {

constexpr int kWarp = 32;
constexpr std::size_t kStack = 256 * 1024;

// The blocks of a cluster, a block's warps, and a warp's threads, run from the last to the first.
inline bool reverse_order = false;

enum class State { runnable, at_barrier, at_cluster_barrier, in_shuffle, done };

// What a thread copies to shared memory while it goes on. The bytes arrive when it waits for them, as late as can be.
struct AsyncCopy {
  void* to;
  const void* from;
  std::size_t size;
  int group;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::done;
  int line = 0;  // of the barrier that it waits at
  uint32_t shuffled = 0;
  int lane_mask = 0;
  std::vector<AsyncCopy> copies;
  int groups = 0;  // of copies, that are closed
};

// How a kernel is launched. A cluster is one block where nothing else is said.
struct Shape {
  int threads, blocks;
  std::size_t dynamic_bytes;
};

class Cluster {
 public:
  static Cluster& instance() {
    static Cluster cluster;
    return cluster;
  }

  // One cluster of blocks that starts at block `first`; each thread calls `body`. Throws std::runtime_error for what
  // CUDA does not allow.
  void run(const Shape& shape, int first, const std::function<void()>& body) {
    if (shape.threads % kWarp != 0) fail("the emulator runs whole warps only");
    shape_ = shape;
    first_ = first;
    body_ = &body;
    error_.clear();
    barriers_ = 0;
    const int count = shape.threads * shape.blocks;
    while (int(threads_.size()) < count) threads_.push_back(std::make_unique<Thread>());
    for (int i = 0; i < count; ++i) start(*threads_[i]);
    // NaN, so that what nobody wrote shows.
    memory_.assign(shape.blocks, std::vector<Line>(shape.dynamic_bytes / sizeof(Line) + 1, Line::unwritten()));
    while (!all(0, count, State::done)) {
      for (int i = 0; i < shape.blocks; ++i) run_block(reverse_order ? shape.blocks - 1 - i : i);
      release_barrier(0, count, State::at_cluster_barrier);
      if (!any_runnable(0, count) && !all(0, count, State::done)) {
        fail("a barrier or shuffle is not reached by all threads");
      }
    }
  }

  void wait_at_barrier(int line) {
    current().line = line;
    leave(State::at_barrier);
  }

  void wait_at_cluster_barrier(int line) {
    current().line = line;
    leave(State::at_cluster_barrier);
  }

  uint32_t shuffle_xor(uint32_t bits, int lane_mask) {
    current().shuffled = bits;
    current().lane_mask = lane_mask;
    leave(State::in_shuffle);
    return current().shuffled;
  }

  int rank() const { return current_ / shape_.threads; }
  int blocks() const { return shape_.blocks; }
  void* dynamic_memory() { return memory_[rank()].data(); }

  // Where `address` of this block's dynamic memory is in that of another block.
  void* map(const void* address, int rank) {
    const auto offset = static_cast<const char*>(address) - static_cast<const char*>(dynamic_memory());
    if (offset < 0 || offset >= std::ptrdiff_t(shape_.dynamic_bytes)) fail_in_thread("not in dynamic shared memory");
    if (rank < 0 || rank >= shape_.blocks) fail_in_thread("a block that the cluster does not have");
    if (rank != this->rank()) {
      if (barriers_ == 0) fail_in_thread("memory of a block that may not have started");
      const int begin = rank * shape_.threads;
      if (all(begin, begin + shape_.threads, State::done)) fail_in_thread("memory of a block that has ended");
    }
    return reinterpret_cast<char*>(memory_[rank].data()) + offset;
  }

  void copy_async(void* to, const void* from, std::size_t size) {
    std::memset(to, 0xFF, size);
    current().copies.push_back({to, from, size, current().groups});
  }
  void close_group() { ++current().groups; }
  // Until at most the `newest` last groups are under way.
  void wait_for_copies(int newest) {
    auto& copies = current().copies;
    const auto arrives = [&](const AsyncCopy& copy) { return copy.group < current().groups - newest; };
    for (const AsyncCopy& copy : copies) {
      if (arrives(copy)) std::memcpy(copy.to, copy.from, copy.size);
    }
    copies.erase(std::remove_if(copies.begin(), copies.end(), arrives), copies.end());
  }

  // Ends the cluster, from inside one of its threads.
  void fail_in_thread(const char* error) {
    error_ = error;
    leave(State::done);
  }

 private:
  struct alignas(128) Line {
    unsigned char bytes[128];
    static Line unwritten() {
      Line line;
      std::memset(line.bytes, 0xFF, sizeof line.bytes);
      return line;
    }
  };

  Thread& current() { return *threads_[current_]; }

  void start(Thread& thread) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, &Cluster::enter, 0);
    thread.state = State::runnable;
    thread.copies.clear();
    thread.groups = 0;
  }

  static void enter() {
    (*instance().body_)();
    if (!instance().current().copies.empty()) instance().fail_in_thread("a thread ends before its copies arrived");
    instance().leave(State::done);
  }

  void leave(State state) {
    current().state = state;
    swapcontext(&current().context, &scheduler_);
  }

  // Until each of its threads waits for another block, or has ended.
  void run_block(int rank) {
    const int begin = rank * shape_.threads, end = begin + shape_.threads;
    while (any_runnable(begin, end)) {
      for (int i = 0; i < shape_.threads; i += kWarp) run_warp(reverse_order ? end - kWarp - i : begin + i);
      release_barrier(begin, end, State::at_barrier);
    }
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
    threadIdx = dim3(i % shape_.threads, 0, 0);
    blockIdx = dim3(first_ + rank(), 0, 0);
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

  void release_barrier(int begin, int end, State state) {
    if (!all(begin, end, state)) return;
    for (int i = begin; i < end; ++i) {
      if (threads_[i]->line != threads_[begin]->line) fail("threads are at different barriers");
      threads_[i]->state = State::runnable;
    }
    if (state == State::at_cluster_barrier) ++barriers_;
  }

  [[noreturn]] void fail(const std::string& error) { throw std::runtime_error(error); }

  std::vector<std::unique_ptr<Thread>> threads_;  // block by block
  std::vector<std::vector<Line>> memory_;         // of each block
  const std::function<void()>* body_ = nullptr;
  ucontext_t scheduler_;
  std::string error_;
  Shape shape_ = {};
  int first_ = 0, current_ = 0;
  int barriers_ = 0;  // of the whole cluster, that it has passed
};

}  // namespace cuda_emulator
