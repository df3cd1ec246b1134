// The CPU kernels for the best instruction set that this machine has.

#pragma once

#include "../combine.h"
#include "../params.h"

namespace gkd::cpu {

void statistics(const StatisticsParams& params, int64_t begin, int64_t end);
void sums(const SumsParams& params, int64_t begin, int64_t end);
void gradient(const GradientParams& params, int64_t begin, int64_t end);
void softcap(const SoftcapParams& params, int64_t begin, int64_t end);

// Of all instruction sets: these are a few numbers per row.
void label_logits(const LabelLogitParams& params, int64_t begin, int64_t end);
void combine_statistics(const CombineParams& params, int64_t begin, int64_t end);
void combine_sums(const CombineSumsParams& params, int64_t begin, int64_t end);

// "avx512", "avx2" or "default"; the environment variable ATEN_CPU_CAPABILITY of torch can choose a lower one.
const char* capability();

}  // namespace gkd::cpu
