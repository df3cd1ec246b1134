// The passes over a top-k on a GPU. `stream` is a cudaStream_t.

#pragma once

#include "../top_k.h"

namespace gkd::cuda {

void top_k_select(const TopKSelectParams& params, void* stream);
void top_k_merge(const TopKMergeParams& params, void* stream);
void top_k_statistics(const TopKStatisticsParams& params, void* stream);
void top_k_sums(const TopKSumsParams& params, void* stream);
void top_k_combine(const TopKCombineParams& params, void* stream);
void top_k_gradient(const TopKGradientParams& params, void* stream);

}  // namespace gkd::cuda
