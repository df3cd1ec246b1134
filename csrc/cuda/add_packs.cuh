// The terms of a pack of logits of both models, for the kernels that sum a row's.

#pragma once

#include "two.cuh"
#include "walk.cuh"

namespace gkd::cuda {

// A pack's sums first: they round less than one long sum. Every other word's exponentials may be polynomials.
template <class Words, class Form, class F>
__device__ __forceinline__ void add_packs(const Form& form, const Pack& student, const Pack& teacher, F& values,
                                          F& slopes) {
  F value = splat<F>(0), slope = splat<F>(0);
  const auto add = [&]<bool kPolynomial>(int word) {
    F s[Words::kLanes], t[Words::kLanes];
    Words::widen(student.word[word], s);
    Words::widen(teacher.word[word], t);
#pragma unroll
    for (int k = 0; k < Words::kLanes; ++k) form.template add<kPolynomial>(s[k], t[k], value, slope);
  };
#pragma unroll
  for (int word = 0; word < kWords; word += 2) {
    add.template operator()<false>(word);
    add.template operator()<true>(word + 1);
  }
  values = values + value;
  slopes = slopes + slope;
}

}  // namespace gkd::cuda
