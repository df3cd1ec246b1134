// The gradient on a GPU: of a student without a softcap here, of one with a softcap in gradient_capped.cu.

#include "gradient.cuh"

namespace gkd::cuda {

void gradient(const GradientParams& params, void* stream) {
  if (params.inverse_softcap != 0) return capped_gradient(params, stream);
  start_gradient<false>(params, stream);
}

}  // namespace gkd::cuda
