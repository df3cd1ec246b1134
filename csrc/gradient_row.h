// The gradient at one entry of a row, for F = float or a vector of floats: for the kernels of CPU and GPU.

#pragma once

#include "divergences.h"
#include "params.h"
#include "softcap.h"

namespace gkd {

// What is constant along a row is computed once.
template <class Functor>
struct GradientRow {
  Functor divergence;
  RowNormalizers n;
  float scale, factor, slope_sum, label_factor, label_shift, label_bias, inverse_softcap;

  GKD_INLINE GradientRow(const GradientParams& params, const Functor& functor, int64_t i) : divergence(functor) {
    const bool with_divergence = params.weight != nullptr;
    n = with_divergence ? params.normalizers[i] : RowNormalizers{};
    scale = params.scale;
    factor = with_divergence ? params.weight[i] * params.inverse_temperature * functor.w.slope_scale : 0;
    slope_sum = with_divergence ? params.slope_sum[i] : 0;
    label_factor = params.label_weight == nullptr ? 0 : params.label_weight[i];
    label_shift = label_factor == 0 ? 0 : params.label_shift[i];
    label_bias = label_factor == 0 ? 0 : params.label_bias[i];
    inverse_softcap = params.inverse_softcap;
  }

  template <class F>
  GKD_INLINE F of_divergence(F s, F t) const {
    const Terms<F> terms = divergence(log2_prob(s, scale, n.student_shift, n.student_bias),
                                      log2_prob(t, scale, n.teacher_shift, n.teacher_bias));
    return factor * (terms.slope - slope_sum * terms.p);
  }

  template <class F>
  GKD_INLINE F of_cross_entropy(F s) const {
    return label_factor * exp2(log2_prob(s, kLog2E, label_shift, label_bias));
  }

  // The gradient by what the student's logit was before its softcap, from the gradient by the logit.
  template <bool kCapped, class F>
  GKD_INLINE F before_softcap(F gradient, F s) const {
    if constexpr (kCapped) return gradient * softcap_slope(s, inverse_softcap);
    return gradient;
  }
};

}  // namespace gkd
