// The gradient on a GPU, of a student whose logits have a softcap. It is compiled apart, as it takes long.

#include "gradient.cuh"

namespace gkd::cuda {

void capped_gradient(const GradientParams& params, void* stream) { start_gradient<true>(params, stream); }

}  // namespace gkd::cuda
