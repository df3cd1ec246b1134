// The divergences at one vocabulary entry, for the kernels of CPU and GPU: one functor each, and the list of them all.
//
// a and b are the log2-probabilities of student S and teacher T, p = 2^a, q = 2^b, and M = beta T + (1 - beta) S. With a
// functor's terms at every entry and scales that are the same for all,
//
//   D = value_scale sum_j value_j                                                                     in nats
//   dD/dz_j = slope_scale (slope_j - p_j sum_u slope_u) / temperature            for the student's logits z
//
// Sums only have to be right as sums: any multiple of q - p may be added to a value and any multiple of p to a slope.
// This is used so that no value is negative and equal distributions give exactly 0. Everything is expressed by the
// higher of p and q and by their ratio e <= 1, so nothing overflows or cancels, however far they are apart.
//
// Sources: generalized JSD: Agarwal et al., arXiv:2306.13649, eq. 1. Skewed KL: Ko et al. (DistiLLM), arXiv:2402.03898,
// section 3.1. Alpha-divergence: Amari, "alpha-divergence is unique, belonging to both f-divergence and Bregman
// divergence classes", IEEE Trans. Inf. Theory 55 (2009), with alpha = 1 - beta.

#pragma once

#include "vector_math.h"

namespace gkd {

constexpr float kImpossible = -1e30f;  // in place of log2(0): finite, so that 0 * log2(0) is 0

template <class F>
GKD_INLINE F log2_prob(F z, float scale, float shift, float bias) {
  return at_least((z - shift) * scale - bias, kImpossible);
}

template <class F>
struct Terms {
  F value;
  F slope;
  F p;
};

// p and q, expressed by the higher one and the ratio of the lower to it.
template <class F>
struct Pair {
  decltype(F{} < F{}) student_is_higher;
  F gap;     // log2 of the ratio, <= 0
  F ratio;   // in [0, 1]
  F higher;  // the higher probability
  F lower;

  GKD_INLINE Pair(F a, F b) {
    student_is_higher = a >= b;
    gap = -magnitude(b - a);
    ratio = exp2(gap);
    higher = exp2(student_is_higher ? a : b);
    lower = higher * ratio;
  }
  GKD_INLINE F pick(F if_student_is_higher, F otherwise) const {
    return student_is_higher ? if_student_is_higher : otherwise;
  }
  GKD_INLINE F constant(float if_student_is_higher, float otherwise) const {
    return student_is_higher ? splat<F>(if_student_is_higher) : splat<F>(otherwise);
  }
  GKD_INLINE F p() const { return pick(higher, lower); }
};

// The terms of the divergences from the mixture M: x log2(x/M) of the higher and of the lower probability x.
template <class F>
struct Mixture {
  Pair<F> pair;
  F weight_of_lower;
  F weight_of_higher;
  F higher_term;
  F lower_term;

  GKD_INLINE Mixture(F a, F b, float teacher_weight, float student_weight) : pair(a, b) {
    weight_of_lower = pair.constant(teacher_weight, student_weight);
    weight_of_higher = pair.constant(student_weight, teacher_weight);
    const auto logs = Accurate::log2_shares(weight_of_lower, weight_of_higher, pair.ratio, pair.gap);
    higher_term = pair.higher * logs.higher;
    lower_term = pair.lower * logs.lower;
  }
  GKD_INLINE F student_term() const { return pair.pick(higher_term, lower_term); }
  GKD_INLINE F teacher_term() const { return pair.pick(lower_term, higher_term); }
  // p - q, and p (p - q) / M
  GKD_INLINE F excess() const {
    const F difference = pair.higher * (1.0f - pair.ratio);
    return pair.pick(difference, -difference);
  }
  GKD_INLINE F excess_over_mixture() const {
    const F share = divide(pair.pick(splat<F>(1.0f), pair.ratio), weight_of_lower * pair.ratio + weight_of_higher);
    return excess() * share;
  }
};

template <class F>
GKD_INLINE F not_negative(F x) {
  return at_least(x, 0.0f);
}

// The parameters of all functors; beta is in (0, 1), except for total variation.
struct Weights {
  float teacher;  // beta
  float student;  // 1 - beta
  float value_scale;
  float slope_scale;
};

// beta KL(T||M) + (1 - beta) KL(S||M)
struct GeneralizedJsd {
  static GKD_INLINE Weights weights(double beta) {
    return {float(beta), float(1 - beta), kLn2, float((1 - beta) * kLn2)};
  }
  Weights w;

  template <class F>
  GKD_INLINE Terms<F> operator()(F a, F b) const {
    const Mixture<F> m(a, b, w.teacher, w.student);
    const F value = m.weight_of_higher * m.higher_term + m.weight_of_lower * m.lower_term;
    return {not_negative(value), m.student_term(), m.pair.p()};
  }
};

// KL(T||S), for gradients only: its value needs no pass of its own.
struct ForwardKl {
  static GKD_INLINE Weights weights(double) { return {0, 0, 1, 1}; }
  Weights w;

  template <class F>
  GKD_INLINE Terms<F> operator()(F a, F b) const {
    const F p = exp2(a);
    return {F{}, p - exp2(b), p};
  }
};

// KL(S||T), for gradients only: its slopes are in nats, and add up to the divergence.
struct ReverseKl {
  static GKD_INLINE Weights weights(double) { return {0, 0, 1, 1}; }
  Weights w;

  template <class F>
  GKD_INLINE Terms<F> operator()(F a, F b) const {
    const F p = exp2(a);
    return {F{}, p * ((a - b) * kLn2), p};
  }
};

// |p - q| / 2, with slope 0 where p = q
struct TotalVariation {
  static GKD_INLINE Weights weights(double) { return {0, 0, 0.5f, 0.5f}; }
  Weights w;

  template <class F>
  GKD_INLINE Terms<F> operator()(F a, F b) const {
    const Pair<F> pair(a, b);
    const F p = pair.p();
    const F slope = pair.pick(p, -p);
    return {pair.higher * (1.0f - pair.ratio), pair.gap < 0.0f ? slope : F{} * p, p};
  }
};

// KL(T||M)
struct SkewedForwardKl {
  static GKD_INLINE Weights weights(double beta) {
    return {float(beta), float(1 - beta), kLn2, float((1 - beta) * (1 - beta))};
  }
  Weights w;

  template <class F>
  GKD_INLINE Terms<F> operator()(F a, F b) const {
    const Mixture<F> m(a, b, w.teacher, w.student);
    const F value = m.teacher_term() + (w.student * kLog2E) * m.excess();
    return {not_negative(value), m.excess_over_mixture(), m.pair.p()};
  }
};

// KL(S||M)
struct SkewedReverseKl {
  static GKD_INLINE Weights weights(double beta) { return {float(beta), float(1 - beta), kLn2, kLn2}; }
  Weights w;

  template <class F>
  GKD_INLINE Terms<F> operator()(F a, F b) const {
    const Mixture<F> m(a, b, w.teacher, w.student);
    const F value = m.student_term() - (w.teacher * kLog2E) * m.excess();
    const F slope = m.student_term() - (w.student * w.teacher * kLog2E) * m.excess_over_mixture();
    return {not_negative(value), slope, m.pair.p()};
  }
};

// (1 - sum p^beta q^(1 - beta)) / (beta (1 - beta))
struct Alpha {
  static GKD_INLINE Weights weights(double beta) {
    return {float(beta), float(1 - beta), float(1 / (beta * (1 - beta))), float(1 / (1 - beta))};
  }
  Weights w;

  template <class F>
  GKD_INLINE Terms<F> operator()(F a, F b) const {
    const Pair<F> pair(a, b);
    // The lower one's exponent x, or x - 1 and one factor of the ratio taken out: whichever is small, as the scales are
    // large where beta is near 0 or 1.
    const bool as_is[2] = {w.student <= 0.5f, w.teacher <= 0.5f};  // where the student is higher, where the teacher is
    const F x = pair.constant(as_is[0] ? w.student : -w.teacher, as_is[1] ? w.teacher : -w.student);
    const F one = splat<F>(1.0f);
    const F factor = pair.pick(as_is[0] ? one : pair.ratio, as_is[1] ? one : pair.ratio);
    const F product = x * pair.gap;
    const F power = factor * Accurate::exp2m1(product < 126.0f ? product : splat<F>(126.0f));
    const F difference = pair.ratio - 1.0f;
    // power or, where a factor was taken out, power + difference is p^beta q^(1 - beta) / higher - 1
    const F slope = pair.constant(as_is[0] ? 0.0f : -1.0f, as_is[1] ? 1.0f : 0.0f) * difference - power;
    return {not_negative(pair.higher * (x * difference - power)), pair.higher * slope, pair.p()};
  }
};

// Every divergence: its name in ops/reference.py and its functor. The list defines the numbering, the lookup by name and
// the dispatch. fast_forms.h has forms with fewer instructions for 16-bit logits, top_k_terms.h the terms for a top-k.
#define GKD_DIVERGENCES(X)              \
  X(generalized_jsd, GeneralizedJsd)    \
  X(forward_kl, ForwardKl)              \
  X(reverse_kl, ReverseKl)              \
  X(total_variation, TotalVariation)    \
  X(skewed_forward_kl, SkewedForwardKl) \
  X(skewed_reverse_kl, SkewedReverseKl) \
  X(alpha, Alpha)

#define GKD_ENUMERATOR(name, ...) name,
enum class DivergenceKind { GKD_DIVERGENCES(GKD_ENUMERATOR) };
#undef GKD_ENUMERATOR

}  // namespace gkd
