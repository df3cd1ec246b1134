// The gradient at one entry of a row, for F = float or a vector of floats: for the kernels of CPU and GPU.

#pragma once

#include "divergences.h"
#include "params.h"
#include "row_bits.h"
#include "row_factors.h"
#include "softcap.h"

namespace gkd {

// What the gradient needs of a row beside its logits: one entry of each of the fields of GradientParams.
struct GradientInputs {
  RowNormalizers normalizers;
  float slope_sum, weight;
  float label_weight, label_shift, label_bias;

  // The entries of row i, 0 where there are none. `with_labels`: whether there are rows with a label.
  static GKD_INLINE GradientInputs of(const GradientParams& params, int64_t i, bool with_labels) {
    const bool with_divergence = params.weight != nullptr;
    const float label_weight = with_labels ? params.label_weight[i] : 0;
    return {with_divergence ? params.normalizers[i] : RowNormalizers{},
            with_divergence ? params.slope_sum[i] : 0,
            with_divergence ? params.weight[i] : 0,
            label_weight,
            label_weight == 0 ? 0 : params.label_shift[i],
            label_weight == 0 ? 0 : params.label_bias[i]};
  }
};

// What is constant along a row is computed once.
template <class Form>
struct GradientRow {
  Form form;
  RowFactors factors;
  float label_factor;
  bool
      shares_label;  // whether `of_divergence` has the cross-entropy in it, whose probabilities are the divergence's own
  float label_shift, label_bias;
  RowBits label_bits;
  float inverse_softcap;

  GKD_INLINE GradientRow(const GradientParams& params, const Weights& weights, int64_t i, bool with_labels)
      : GradientRow(params, weights, GradientInputs::of(params, i, with_labels)) {}

  GKD_INLINE GradientRow(const GradientParams& params, const Weights& weights, const GradientInputs& row)
      : form(weights, Normalization{params.scale, row.normalizers}),
        factors{},
        label_factor(row.label_weight),
        shares_label(false),
        label_shift(row.label_shift),
        label_bias(row.label_bias),
        label_bits(kLog2E, label_shift, label_bias),
        inverse_softcap(params.inverse_softcap) {
    if (row.weight == 0) return;
    shares_label = label_factor != 0 && params.scale == kLog2E;
    const float factor = row.weight * params.inverse_temperature * weights.slope_scale;
    const float slope_sum = row.slope_sum - form.slope_shift, label = shares_label ? label_factor : 0.0f;
    factors = {factor * form.slope_factor, slope_sum, label, form.p_factor * (label - factor * slope_sum)};
  }

  template <bool kPolynomial = false, class F>
  GKD_INLINE F of_divergence(F s, F t) const {
    return form.template gradient<kPolynomial>(s, t, factors);
  }

  // Of the label's cross-entropy, without the label's own -1.
  template <class F>
  GKD_INLINE F of_cross_entropy(F s) const {
    if constexpr (Form::kFast) {
      return exp2(label_bits(s)) * splat<F>(label_factor * exact_exp2(-label_bits.excess));
    } else {
      return label_factor * exp2(log2_prob(s, kLog2E, label_shift, label_bias));
    }
  }

  // The gradient by what the student's logit was before its softcap, from the gradient by the logit.
  template <bool kCapped, class F>
  GKD_INLINE F before_softcap(F gradient, F s) const {
    if constexpr (kCapped) return gradient * softcap_slope(s, inverse_softcap);
    return gradient;
  }
};

}  // namespace gkd
