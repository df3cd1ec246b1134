// The functions that the tests call: what combines the ranks' numbers, for a GPU, emulated, and for the CPU.

#include <cuda_runtime.h>

#include "../../csrc/cpu/passes.h"
#include "../../csrc/cuda/passes.h"

extern "C" {

void cuda_label_logits(const gkd::LabelLogitParams* params) { gkd::cuda::label_logits(*params, nullptr); }
void cuda_combine_statistics(const gkd::CombineParams* params) { gkd::cuda::combine_statistics(*params, nullptr); }
void cuda_combine_sums(const gkd::CombineSumsParams* params) { gkd::cuda::combine_sums(*params, nullptr); }

void cpu_label_logits(const gkd::LabelLogitParams* params) { gkd::cpu::label_logits(*params, 0, params->rows); }
void cpu_combine_statistics(const gkd::CombineParams* params) {
  gkd::cpu::combine_statistics(*params, 0, params->rows);
}
void cpu_combine_sums(const gkd::CombineSumsParams* params) { gkd::cpu::combine_sums(*params, 0, params->rows); }
}
