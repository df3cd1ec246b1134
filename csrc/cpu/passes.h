// The CPU kernels for the best instruction set that this machine has.

#pragma once

#include "../params.h"

namespace gkd::cpu {

void statistics(const StatisticsParams& params, int64_t begin, int64_t end);
void sums(const SumsParams& params, int64_t begin, int64_t end);
void gradient(const GradientParams& params, int64_t begin, int64_t end);

// "avx512", "avx2" or "default"; the environment's ATEN_CPU_CAPABILITY, which torch itself obeys, may ask for less.
const char* capability();

}  // namespace gkd::cpu
