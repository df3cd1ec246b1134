// The GPU kernels. `stream` is a cudaStream_t.

#pragma once

#include "../combine.h"
#include "../params.h"

namespace gkd::cuda {

void statistics(const StatisticsParams& params, void* stream);
void sums(const SumsParams& params, void* stream);
void gradient(const GradientParams& params, void* stream);
void capped_gradient(const GradientParams& params, void* stream);  // `gradient` where there is a softcap
// Whether clusters of blocks may share a row: in `cluster_loss`, and in the passes where there are few rows. Off at first.
void use_clusters(bool enabled);

// All three passes in one. False, and nothing is done, where the row does not fit, for other logits than bf16 without a
// softcap, and where the device has no clusters.
bool cluster_loss(const LossParams& params, void* stream);
void softcap(const SoftcapParams& params, void* stream);
void label_logits(const LabelLogitParams& params, void* stream);
void combine_statistics(const CombineParams& params, void* stream);
void combine_sums(const CombineSumsParams& params, void* stream);

}  // namespace gkd::cuda
