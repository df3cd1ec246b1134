// The passes over a top-k for the best instruction set that this machine has, over rows [begin, end).

#pragma once

#include "../top_k.h"

namespace gkd::cpu {

void top_k_select(const TopKSelectParams& params, int64_t begin, int64_t end);
void top_k_merge(const TopKMergeParams& params, int64_t begin, int64_t end);
void top_k_statistics(const TopKStatisticsParams& params, int64_t begin, int64_t end);
void top_k_sums(const TopKSumsParams& params, int64_t begin, int64_t end);
void top_k_combine(const TopKCombineParams& params, int64_t begin, int64_t end);
void top_k_gradient(const TopKGradientParams& params, int64_t begin, int64_t end);

}  // namespace gkd::cpu
