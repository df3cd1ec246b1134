// A functor of divergences.h as a form, which is what kernels use: see fast_forms.h.

#pragma once

#include "divergences.h"
#include "row_bits.h"
#include "row_factors.h"

namespace gkd {

template <class Functor>
struct AccurateForm {
  Functor divergence;
  Normalization row;
  float value_factor;
  static constexpr bool kFast = false;
  static constexpr bool kNeedsRegisters = true;  // more than 64 in a loop
  static constexpr bool kForAnyBeta = true;
  static constexpr float slope_factor = 1, p_factor = 1, slope_shift = 0;

  GKD_INLINE AccurateForm(const Weights& w, const Normalization& row)
      : divergence{w}, row(row), value_factor(w.value_scale) {}

  template <class F>
  GKD_INLINE Terms<F> terms(F s, F t) const {
    return divergence(log2_prob(s, row.scale, row.n.student_shift, row.n.student_bias),
                      log2_prob(t, row.scale, row.n.teacher_shift, row.n.teacher_bias));
  }

  template <bool kPolynomial, class F>
  GKD_INLINE void add(F s, F t, F& value, F& slope) const {
    const Terms<F> at = terms(s, t);
    value += at.value;
    slope += at.slope;
  }
  template <bool kPolynomial, class F>
  GKD_INLINE F gradient(F s, F t, const RowFactors& factors) const {
    const Terms<F> at = terms(s, t);
    return factors.factor * (at.slope - factors.slope_sum * at.p) + factors.label * at.p;
  }
};

// The divergence in nats and the sum of slopes, without their scale, from the sums of a form's terms.
struct RowSums {
  float value;
  float slope;

  template <class Form, class Sum>
  GKD_INLINE RowSums(const Form& form, Sum values, Sum slopes)
      : value(float(values * form.value_factor) + 0.0f), slope(float(slopes * form.slope_factor) + 0.0f) {  // no -0
    if constexpr (requires { form.value_from_slope; }) value += float(slopes * form.value_from_slope);
  }
};

}  // namespace gkd
