// p and q of a vocabulary entry for 16-bit logits: their ratio, and their mixture relative to the higher of them.
//
// For the forms of fast_forms.h, which explains the excesses and k.

#pragma once

#include "divergences.h"
#include "row_bits.h"

namespace gkd::fast {

constexpr float kLeast = 127;  // 2^-127 is 0 in fp32 without subnormal numbers

// The ratio of the lower of p and q to the higher, 2^-distance.
template <class F>
struct Ratio {
  decltype(F{} < F{}) teacher_is_higher;
  F distance;  // in bits, in [0, 127]
  F ratio;

  GKD_INLINE Ratio(F a, F b) : teacher_is_higher(a < b), distance(at_most(magnitude(b - a), kLeast)) {
    ratio = exp2(-distance);
  }
  GKD_INLINE F pick_by_teacher(F if_teacher_is_higher, F otherwise) const {
    return pick(teacher_is_higher, if_teacher_is_higher, otherwise);
  }
  GKD_INLINE F constant(float if_teacher_is_higher, float otherwise) const {
    return pick(teacher_is_higher, splat<F>(if_teacher_is_higher), splat<F>(otherwise));
  }
  GKD_INLINE F bits_to_student() const { return pick_by_teacher(distance, splat<F>(0)); }
  GKD_INLINE F bits_to_teacher() const { return pick_by_teacher(splat<F>(0), distance); }
};

// p and q, for one exponential beside that of their ratio.
template <class F>
struct Both : Ratio<F> {
  F higher, lower;

  template <bool kPolynomial>
  static GKD_INLINE Both of(F a, F b) {
    const Ratio<F> ratio(a, b);
    const F higher = exp2_either<kPolynomial>(larger(a, b));
    return {ratio, higher, higher * ratio.ratio};
  }
  GKD_INLINE F p() const { return this->pick_by_teacher(lower, higher); }
  GKD_INLINE F q() const { return this->pick_by_teacher(higher, lower); }
};

// The mixture 2^k M, relative to the higher probability.
template <class F>
struct Share {
  F of_lower;  // what the lower probability adds to it
  F mixture;
  F log;
};

struct MixtureRow {
  PairBits bits;
  float student_weight;  // times 2^(k - excess_S)
  float teacher_weight;

  GKD_INLINE MixtureRow(const PairBits& bits, const Weights& w, float k) : bits(bits) {
    // Their sum is exactly 1 where the excesses are equal.
    student_weight = (1 - w.teacher) * exact_exp2(k - bits.student.excess);
    teacher_weight = w.teacher * exact_exp2(k - bits.teacher.excess);
  }
  template <class F>
  GKD_INLINE Share<F> share(const Ratio<F>& r) const {
    const F of_lower = r.constant(student_weight, teacher_weight) * r.ratio;
    const F mixture = of_lower + r.constant(teacher_weight, student_weight);
    return {of_lower, mixture, log2(mixture)};
  }
};

}  // namespace gkd::fast
