#include "../combine.h"

#include "passes.h"

namespace gkd::cpu {

void label_logits(const LabelLogitParams& params, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) label_logit_row(params, i);
}

void combine_statistics(const CombineParams& params, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) combine_statistics_row(params, i);
}

void combine_sums(const CombineSumsParams& params, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) combine_sums_row(params, i);
}

}  // namespace gkd::cpu
