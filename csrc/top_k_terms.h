// The divergences at one outcome of a top-k, in double: a few numbers a token, so nothing is saved by less.
//
// Mirrors ops/pointwise.py, which explains the forms.

#pragma once

#include <cmath>

#include "combine.h"
#include "divergences.h"

namespace gkd {

struct OutcomeTerms {
  double value;
  double slope;
};

namespace detail {

constexpr double kFarRatio = 60;

GKD_INLINE double not_less_than_zero(double x) { return x < 0 ? 0.0 : x; }  // NaN stays NaN

// ln(1 - w + w e^x)
GKD_INLINE double log_mix(double x, double w) {
  if (x > kFarRatio) return x + log(w);
  if (w > 0.5 && x < -0.5) return log(1 - w + w * exp(x));
  return log1p(w * expm1(x));
}

GKD_INLINE double share(double x, double p, double mixture) { return mixture > 0 ? x * p / mixture : 0.0; }

GKD_INLINE OutcomeTerms alpha_terms(double ratio, double p, double q, double beta) {
  const bool teacher_is_higher = ratio > 0;
  const double gap = -fabs(ratio), higher = p > q ? p : q, difference = expm1(gap);
  const double exponent = teacher_is_higher ? beta : 1 - beta, x = exponent > 0.5 ? exponent - 1 : exponent;
  const bool taken_out = x < 0;
  const double product = x * gap;
  const double power = (taken_out ? difference + 1 : 1.0) * expm1(product < kFarRatio ? product : kFarRatio);
  const double mean = taken_out ? power + difference : power;
  const double of_teacher = taken_out ? -power : difference - power;
  return {not_less_than_zero(higher * (x * difference - power) / (beta * (1 - beta))),
          higher * (teacher_is_higher ? of_teacher : -mean) / (1 - beta)};
}

}  // namespace detail

// One outcome of student and teacher: log-probabilities in nats, -inf for none.
struct Outcome {
  double a, b, p, q, ratio;

  GKD_INLINE Outcome(double a, double b) : a(a), b(b), p(exp(a)), q(exp(b)), ratio(a == b ? 0.0 : b - a) {}

  GKD_INLINE OutcomeTerms forward_kl() const {
    const double difference = p - q;
    return {detail::not_less_than_zero(detail::weighted(q, ratio) + difference), difference};
  }
  GKD_INLINE OutcomeTerms reverse_kl() const {
    const double slope = detail::weighted(p, -ratio);
    return {detail::not_less_than_zero(slope - (p - q)), slope};
  }
  GKD_INLINE OutcomeTerms terms(DivergenceKind kind, double beta) const {
    using namespace detail;
    const double excess = p - q, mixture = beta * q + (1 - beta) * p;
    switch (kind) {
      case DivergenceKind::forward_kl:
        return forward_kl();
      case DivergenceKind::reverse_kl:
        return reverse_kl();
      case DivergenceKind::total_variation:
        return {fabs(excess) / 2, ratio < 0 ? p / 2 : ratio > 0 ? -p / 2 : 0.0};
      case DivergenceKind::skewed_forward_kl: {
        const double teacher = weighted(q, -log_mix(-ratio, 1 - beta));
        return {not_less_than_zero(teacher + (1 - beta) * excess), (1 - beta) * (1 - beta) * share(excess, p, mixture)};
      }
      case DivergenceKind::skewed_reverse_kl: {
        const double student = weighted(p, -log_mix(ratio, beta));
        return {not_less_than_zero(student - beta * excess), student - beta * (1 - beta) * share(excess, p, mixture)};
      }
      case DivergenceKind::alpha:
        return alpha_terms(ratio, p, q, beta);
      case DivergenceKind::generalized_jsd: {
        const double student = weighted(p, -log_mix(ratio, beta));
        const double teacher = weighted(q, -log_mix(-ratio, 1 - beta)), slope = (1 - beta) * student;
        return {not_less_than_zero(beta * teacher + slope), slope};
      }
    }
    return {nan(""), nan("")};
  }
};

}  // namespace gkd
