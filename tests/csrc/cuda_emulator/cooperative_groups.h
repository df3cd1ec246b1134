// Replaces CUDA's header; see cuda_runtime.h.

#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  static unsigned block_rank() { return unsigned(cuda_emulator::Cluster::instance().rank()); }
  static unsigned num_blocks() { return unsigned(cuda_emulator::Cluster::instance().blocks()); }
  static void sync(int line = __builtin_LINE()) { cuda_emulator::Cluster::instance().wait_at_cluster_barrier(line); }
  template <class T>
  static T* map_shared_rank(T* address, int rank) {
    return static_cast<T*>(cuda_emulator::Cluster::instance().map(address, rank));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
