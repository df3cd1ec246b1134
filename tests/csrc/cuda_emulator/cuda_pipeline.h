// Replaces CUDA's header; see cuda_runtime.h.

#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, std::size_t size) {
  cuda_emulator::check_alignment(static_cast<const uint4*>(to));
  cuda_emulator::check_alignment(static_cast<const uint4*>(from));
  cuda_emulator::Cluster::instance().copy_async(to, from, size);
}
inline void __pipeline_commit() { cuda_emulator::Cluster::instance().close_group(); }
inline void __pipeline_wait_prior(std::size_t newest) {
  cuda_emulator::Cluster::instance().wait_for_copies(int(newest));
}
