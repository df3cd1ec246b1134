// The softcap of a head: from the product z to the logit y = cap tanh(z / cap), and dy/dz. For the kernels of CPU and GPU,
// with F = float or a vector of floats.

#pragma once

#include "vector_math.h"

namespace gkd {

// tanh x = e / (e + 2) with e = exp(2x) - 1, for |x|: the relative error is that of `exp2m1`, near 0 too. NaN stays NaN.
template <class F>
GKD_INLINE F softcap(F z, float cap) {
  const F bits = magnitude(z) * (2 * kLog2E / cap);
  const F e = Accurate::exp2m1(bits > 64.0f ? splat<F>(64.0f) : bits);  // at 2^64 the quotient is 1
  const F y = cap * divide(e, e + 2.0f);
  return z < 0.0f ? -y : y;
}

// dy/dz at the logit y, never negative.
template <class F>
GKD_INLINE F softcap_slope(F y, float inverse_cap) {
  const F share = y * splat<F>(inverse_cap);
  return at_least(splat<F>(1) - share * share, 0.0f);
}

}  // namespace gkd
