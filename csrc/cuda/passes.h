// The GPU kernels. `stream` is a cudaStream_t.

#pragma once

#include "../params.h"

namespace gkd::cuda {

void statistics(const StatisticsParams& params, void* stream);
void sums(const SumsParams& params, void* stream);
void gradient(const GradientParams& params, void* stream);
void capped_gradient(const GradientParams& params, void* stream);  // `gradient` where there is a softcap
void softcap(const SoftcapParams& params, void* stream);

}  // namespace gkd::cuda
