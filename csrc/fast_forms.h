// The divergences of 16-bit logits at one vocabulary entry: as few instructions as their rounding allows.
//
// The terms are those of divergences.h, with the same sources, of a = log2 p + excess_S and b = log2 q + excess_T (see
// row_bits.h). A form is constructed once a row. With its terms at every entry,
//
//   D = value_factor sum_j value_j                                                in nats
//   slope_j of divergences.h = slope_factor slope_j + slope_shift p_j, and p_j = p_factor 2^a
//
// where only sums have to be right: slopes may differ by a multiple of p from those of divergences.h. The weights of a
// mixture take the excesses up: M 2^k = w_S 2^(k - excess_S) 2^a + w_T 2^(k - excess_T) 2^b, with the k for which the
// sum of values needs a factor only, because p, q and M add up to 1 each.
//
// Equal logits give exactly 0. An excluded entry (-inf) adds 0. A row with NaN has a normalizer that is NaN, and so has
// NaN in its factors. Errors are about 1e-7 of an entry's probability, below the rounding of 16-bit logits.

#pragma once

#include "accurate_form.h"
#include "divergences.h"
#include "mixture.h"
#include "row_bits.h"
#include "row_factors.h"

namespace gkd::fast {

// A form whose slopes are p times `weight`, a number of the entry.
template <class F>
struct Weighted {
  F p;
  F weight;

  GKD_INLINE F gradient(const RowFactors& row) const {
    return p * fused(weight, splat<F>(row.factor), splat<F>(row.offset));
  }
};

struct GeneralizedJsd {
  static constexpr bool kFast = true;
  static constexpr bool kNeedsRegisters = true;
  static constexpr bool kForAnyBeta = false;
  MixtureRow row;
  float value_factor, slope_factor, p_factor;
  static constexpr float slope_shift = 0;

  GKD_INLINE GeneralizedJsd(const Weights& w, const PairBits& bits)
      : GeneralizedJsd(w, bits, bits.student.excess + w.teacher * (bits.teacher.excess - bits.student.excess)) {}
  GKD_INLINE GeneralizedJsd(const Weights& w, const PairBits& bits, float k) : row(bits, w, k) {
    value_factor = -w.value_scale * exact_exp2(-k);
    p_factor = exact_exp2(-bits.student.excess);
    slope_factor = -p_factor;
  }

  template <bool kPolynomial, class F>
  GKD_INLINE void add(F s, F t, F& value, F& slope) const {
    const auto r = Both<F>::template of<kPolynomial>(row.bits.student(s), row.bits.teacher(t));
    const auto m = row.share(r);
    value = fused(r.higher, fused(m.of_lower, r.distance, m.log * m.mixture), value);
    slope = fused(r.p(), m.log + r.bits_to_student(), slope);
  }
  template <bool kPolynomial, class F>
  GKD_INLINE F gradient(F s, F t, const RowFactors& factors) const {
    const F a = row.bits.student(s);
    const Ratio<F> r(a, row.bits.teacher(t));
    const auto m = row.share(r);
    return Weighted<F>{exp2_either<kPolynomial>(a), m.log + r.bits_to_student()}.gradient(factors);
  }
};

// With equal weights: nothing has to be selected. The mixture then takes p 2^-lack and q 2^lack, with half the excesses'
// difference as the lack. The sums make up for that to the first order, as the derivative of the divergence by the lack
// is half the difference of KL(T||M) and KL(S||M). A gradient is off by a share of itself, 2^-24 of the log-sum-exp in
// bits.
struct EvenJsd {
  static constexpr bool kFast = true;
  static constexpr bool kNeedsRegisters = false;
  static constexpr bool kForAnyBeta = false;
  PairBits bits;
  float value_factor, slope_factor, p_factor;
  float value_from_slope;  // what the sum of slopes adds to the divergence
  static constexpr float slope_shift = 0;

  GKD_INLINE EvenJsd(const Weights& w, const PairBits& pair) : bits(pair) {
    const float lack = 0.5f * (pair.teacher.excess - pair.student.excess);
    value_factor = -0.5f * w.value_scale * exact_exp2(-pair.student.excess - lack) * (1 - kLn2 * lack);
    p_factor = exact_exp2(-pair.student.excess) + 0 * lack;  // NaN where only the teacher has NaN, too
    slope_factor = -p_factor;
    value_from_slope = w.value_scale * kLn2 * lack * slope_factor;
  }

  template <bool kPolynomial, class F>
  GKD_INLINE void add(F s, F t, F& value, F& slope) const {
    const auto r = Both<F>::template of<kPolynomial>(bits.student(s), bits.teacher(t));
    const F sum = r.ratio + splat<F>(1), log = log2(sum) + splat<F>(-1);
    value = fused(r.higher, fused(r.ratio, r.distance, log * sum), value);
    slope = fused(r.p(), log + r.bits_to_student(), slope);
  }
  template <bool kPolynomial, class F>
  GKD_INLINE F gradient(F s, F t, const RowFactors& factors) const {
    const F a = bits.student(s);
    const Ratio<F> r(a, bits.teacher(t));
    const F log = log2(r.ratio + splat<F>(1)) + splat<F>(-1);
    return Weighted<F>{exp2_either<kPolynomial>(a), log + r.bits_to_student()}.gradient(factors);
  }
};

struct SkewedForwardKl {
  static constexpr bool kFast = true;
  static constexpr bool kNeedsRegisters = true;
  static constexpr bool kForAnyBeta = false;
  MixtureRow row;
  float student_share;  // 2^(excess_T - excess_S)
  float value_factor, slope_factor, p_factor;
  static constexpr float slope_shift = 0;

  GKD_INLINE SkewedForwardKl(const Weights& w, const PairBits& bits) : row(bits, w, bits.teacher.excess) {
    student_share = exact_exp2(bits.teacher.excess - bits.student.excess);
    value_factor = -w.value_scale * exact_exp2(-bits.teacher.excess);
    slope_factor = p_factor = exact_exp2(-bits.student.excess);
  }
  // (p - q) / M
  template <class F>
  GKD_INLINE F excess_over_mixture(const Ratio<F>& r, const Share<F>& m) const {
    const F share = splat<F>(student_share);
    return quotient(r.pick_by_teacher(fused(share, r.ratio, splat<F>(-1)), share - r.ratio), m.mixture);
  }

  template <bool kPolynomial, class F>
  GKD_INLINE void add(F s, F t, F& value, F& slope) const {
    const auto r = Both<F>::template of<kPolynomial>(row.bits.student(s), row.bits.teacher(t));
    const auto m = row.share(r);
    value = fused(r.q(), m.log + r.bits_to_teacher(), value);
    slope = fused(r.p(), excess_over_mixture(r, m), slope);
  }
  template <bool kPolynomial, class F>
  GKD_INLINE F gradient(F s, F t, const RowFactors& factors) const {
    const F a = row.bits.student(s);
    const Ratio<F> r(a, row.bits.teacher(t));
    return Weighted<F>{exp2_either<kPolynomial>(a), excess_over_mixture(r, row.share(r))}.gradient(factors);
  }
};

struct SkewedReverseKl {
  static constexpr bool kFast = true;
  static constexpr bool kNeedsRegisters = true;
  static constexpr bool kForAnyBeta = false;
  MixtureRow row;
  float bits_of_student_weight;
  float value_factor, slope_factor, p_factor;
  static constexpr float slope_shift = 0;

  GKD_INLINE SkewedReverseKl(const Weights& w, const PairBits& bits) : row(bits, w, bits.student.excess) {
    bits_of_student_weight = w.student * kLog2E;
    p_factor = exact_exp2(-bits.student.excess);
    slope_factor = -p_factor;
    value_factor = -w.value_scale * p_factor;
  }
  // log2(M/p) + w_S log2(e) (p/M - 1)
  template <class F>
  GKD_INLINE F weight(const Ratio<F>& r, const Share<F>& m, F bits) const {
    const F share = quotient(r.pick_by_teacher(r.ratio, splat<F>(1)), m.mixture);
    return fused(splat<F>(bits_of_student_weight), share, bits + splat<F>(-bits_of_student_weight));
  }

  template <bool kPolynomial, class F>
  GKD_INLINE void add(F s, F t, F& value, F& slope) const {
    const auto r = Both<F>::template of<kPolynomial>(row.bits.student(s), row.bits.teacher(t));
    const auto m = row.share(r);
    const F p = r.p(), bits = m.log + r.bits_to_student();
    value = fused(p, bits, value);
    slope = fused(p, weight(r, m, bits), slope);
  }
  template <bool kPolynomial, class F>
  GKD_INLINE F gradient(F s, F t, const RowFactors& factors) const {
    const F a = row.bits.student(s);
    const Ratio<F> r(a, row.bits.teacher(t));
    const auto m = row.share(r);
    return Weighted<F>{exp2_either<kPolynomial>(a), weight(r, m, m.log + r.bits_to_student())}.gradient(factors);
  }
};

struct ForwardKl {
  static constexpr bool kFast = true;
  static constexpr bool kNeedsRegisters = false;
  static constexpr bool kForAnyBeta = true;
  PairBits bits;
  float student_share;  // 2^(excess_T - excess_S)
  float value_factor, slope_factor, p_factor;
  static constexpr float slope_shift = 0;

  GKD_INLINE ForwardKl(const Weights&, const PairBits& pair) : bits(pair) {
    student_share = exact_exp2(pair.teacher.excess - pair.student.excess);
    slope_factor = exact_exp2(-pair.teacher.excess);
    p_factor = exact_exp2(-pair.student.excess);
    value_factor = 0;
  }

  template <bool kPolynomial, class F>
  GKD_INLINE void add(F s, F t, F&, F& slope) const {
    slope = slope + fused(exp2(bits.student(s)), splat<F>(student_share), -exp2(bits.teacher(t)));
  }
  template <bool kPolynomial, class F>
  GKD_INLINE F gradient(F s, F t, const RowFactors& factors) const {
    const F p = exp2(bits.student(s)), slope = fused(p, splat<F>(student_share), -exp2(bits.teacher(t)));
    return fused(p, splat<F>(factors.offset), slope * splat<F>(factors.factor));
  }
};

struct ReverseKl {
  static constexpr bool kFast = true;
  static constexpr bool kNeedsRegisters = false;
  static constexpr bool kForAnyBeta = true;
  PairBits bits;
  float value_factor, slope_factor, p_factor;
  float slope_shift;

  GKD_INLINE ReverseKl(const Weights&, const PairBits& pair) : bits(pair) {
    p_factor = exact_exp2(-pair.student.excess);
    slope_factor = p_factor * kLn2;
    slope_shift = (pair.teacher.excess - pair.student.excess) * kLn2;
    value_factor = 0;
  }
  template <class F>
  GKD_INLINE Weighted<F> weighted(F s, F t) const {
    const F a = at_least(bits.student(s), kImpossible), b = at_least(bits.teacher(t), kImpossible);
    return {exp2(a), a - b};
  }

  template <bool kPolynomial, class F>
  GKD_INLINE void add(F s, F t, F&, F& slope) const {
    const auto entry = weighted(s, t);
    slope = fused(entry.p, entry.weight, slope);
  }
  template <bool kPolynomial, class F>
  GKD_INLINE F gradient(F s, F t, const RowFactors& factors) const {
    return weighted(s, t).gradient(factors);
  }
};

struct TotalVariation {
  static constexpr bool kFast = true;
  static constexpr bool kNeedsRegisters = false;
  static constexpr bool kForAnyBeta = true;
  static constexpr float kRounding = 0x1p-20f;  // probabilities that differ by a smaller share count as equal
  PairBits bits;
  float student_share;  // 2^(excess_T - excess_S)
  float value_factor, slope_factor, p_factor;
  static constexpr float slope_shift = 0;

  GKD_INLINE TotalVariation(const Weights& w, const PairBits& pair) : bits(pair) {
    student_share = exact_exp2(pair.teacher.excess - pair.student.excess);
    const float unit = exact_exp2(-pair.teacher.excess);
    value_factor = w.value_scale * unit;
    slope_factor = p_factor = unit * student_share;  // NaN where only the teacher has NaN, too
  }
  template <class F>
  GKD_INLINE F slope_at(F p, F q) const {
    const F zero = splat<F>(0);
    const F above = fused(p, splat<F>(student_share * (1 - kRounding)), -q);
    const F below = fused(p, splat<F>(student_share * (1 + kRounding)), -q);
    return pick(zero < above, p, pick(below < zero, -p, zero));
  }

  template <bool kPolynomial, class F>
  GKD_INLINE void add(F s, F t, F& value, F& slope) const {
    const F p = exp2(bits.student(s)), q = exp2(bits.teacher(t));
    value = value + magnitude(fused(p, splat<F>(student_share), -q));
    slope = slope + slope_at(p, q);
  }
  template <bool kPolynomial, class F>
  GKD_INLINE F gradient(F s, F t, const RowFactors& factors) const {
    const F p = exp2(bits.student(s)), q = exp2(bits.teacher(t));
    return fused(p, splat<F>(factors.offset), slope_at(p, q) * splat<F>(factors.factor));
  }
};

struct Alpha {
  static constexpr bool kFast = true;
  static constexpr bool kNeedsRegisters = false;
  static constexpr bool kForAnyBeta = false;
  PairBits bits;
  float student_weight, student_share, teacher_share;  // the shares are 2^(k - excess)
  float value_factor, slope_factor, p_factor;
  static constexpr float slope_shift = 0;

  GKD_INLINE Alpha(const Weights& w, const PairBits& pair) : bits(pair), student_weight(1 - w.teacher) {
    const float k = pair.student.excess + student_weight * (pair.teacher.excess - pair.student.excess);
    student_share = exact_exp2(k - pair.student.excess);
    teacher_share = exact_exp2(k - pair.teacher.excess);
    slope_factor = exact_exp2(-k);
    value_factor = w.value_scale * slope_factor;
    p_factor = exact_exp2(-pair.student.excess);
  }

  // p, and p - p^beta q^(1 - beta)
  template <class F>
  struct Entry {
    F p, b, scaled, slope;
  };
  template <class F>
  GKD_INLINE Entry<F> entry(F s, F t) const {
    const F a = at_least(bits.student(s), kImpossible), b = bits.teacher(t), p = exp2(a);
    const F scaled = p * splat<F>(student_share);
    return {p, b, scaled, scaled - exp2(fused(splat<F>(student_weight), b - a, a))};
  }

  template <bool kPolynomial, class F>
  GKD_INLINE void add(F s, F t, F& value, F& slope) const {
    const auto at = entry(s, t);
    const F difference = fused(exp2_either<kPolynomial>(at.b), splat<F>(teacher_share), -at.scaled);
    value = value + fused(splat<F>(student_weight), difference, at.slope);
    slope = slope + at.slope;
  }
  template <bool kPolynomial, class F>
  GKD_INLINE F gradient(F s, F t, const RowFactors& factors) const {
    const auto at = entry(s, t);
    return fused(at.p, splat<F>(factors.offset), at.slope * splat<F>(factors.factor));
  }
};

}  // namespace gkd::fast

namespace gkd {

// The form of a functor for 16-bit logits: the accurate one where there is no faster one.
template <class Functor>
struct FastForm {
  using type = AccurateForm<Functor>;
};

#define GKD_FAST_FORM(name)  \
  template <>                \
  struct FastForm<name> {    \
    using type = fast::name; \
  };
GKD_FAST_FORM(GeneralizedJsd)
GKD_FAST_FORM(ForwardKl)
GKD_FAST_FORM(ReverseKl)
GKD_FAST_FORM(TotalVariation)
GKD_FAST_FORM(SkewedForwardKl)
GKD_FAST_FORM(SkewedReverseKl)
GKD_FAST_FORM(Alpha)
#undef GKD_FAST_FORM

}  // namespace gkd
