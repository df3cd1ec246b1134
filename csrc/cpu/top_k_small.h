// The passes over the few numbers of each row, on a CPU.

#pragma once

#include "top_k_kernels.h"

namespace gkd::GKD_CPU_NAMESPACE {

void top_k_merge(const TopKMergeParams& params, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) merge_row(params, i, Alone());
}

void top_k_combine(const TopKCombineParams& params, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) combine_row(params, i);
}

void top_k_sums(const TopKSumsParams& params, int64_t begin, int64_t end) {
  GKD_TYPE_SWITCH(params.logits.type, [&] {
    for (int64_t i = begin; i < end; ++i) sums_row<Reader<kType>>(params, i, row_of<kType>(params.logits, i), Alone());
  });
}

}  // namespace gkd::GKD_CPU_NAMESPACE
