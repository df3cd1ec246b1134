// What is constant along a row where logits have 16 bits: log2-probabilities by one fused multiply-add each.
//
// With the log-sum-exp C in bits, log2 p = scale z - C. C is rounded to fp32, so the result a = fl(scale z - fl(C)) is too
// large by `excess`, the same for the whole row: 2^a = 2^excess p. Kernels sum with 2^a in place of p, and multiply by
// powers of the excess where a row begins or ends. However large the logits are, nothing is lost.

#pragma once

#include "divergences.h"
#include "params.h"
#include "vector_math.h"

namespace gkd {

struct RowBits {
  float scale;
  float offset;
  float excess;

  // Log2-probabilities are scale (z - shift) - bias.
  GKD_INLINE RowBits(float scale, float shift, float bias) : scale(scale) {
    offset = -fused(scale, shift, bias);
    excess = fused(scale, shift, offset) + bias;
  }

  template <class F>
  GKD_INLINE F operator()(F z) const {
    if constexpr (RoundsOnce<F>::value) {
      return fused(z, splat<F>(scale), splat<F>(offset));
    } else {
      // Products of a 16-bit logit and half of the scale's digits are exact.
      const float high = Lanes<float>::from_bits(Lanes<float>::bits(scale) & ~0xFFF), low = scale - high;
      const F finite = at_least(z, kImpossible);  // as `low` may be 0
      return (finite * high + offset) + finite * low;
    }
  }
};

// What a form is constructed from.
struct Normalization {
  float scale;
  RowNormalizers n;
};

struct PairBits {
  RowBits student;
  RowBits teacher;

  GKD_INLINE PairBits(const Normalization& row)
      : student(row.scale, row.n.student_shift, row.n.student_bias),
        teacher(row.scale, row.n.teacher_shift, row.n.teacher_bias) {}
};

}  // namespace gkd
