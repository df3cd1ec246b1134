// The gradients of a pack's entries, for the kernels that write a row's.

#pragma once

#include "../gradient_row.h"
#include "two.cuh"
#include "walk.cuh"

namespace gkd::cuda {

// Those of the divergence, the cross-entropy or both, without the label's own -1; zeros for neither. Every other word's
// exponentials may be polynomials.
template <FloatType type, bool kCapped, bool kDivergence, bool kCrossEntropy, class Form>
__device__ __forceinline__ Pack gradient_pack(const GradientRow<Form>& at, const Pack& student, const Pack& teacher) {
  using F = Lane<type, Form>;
  using Words = Word<type, F>;
  Pack pack;
  const auto write = [&]<bool kPolynomial>(int word) {
    F s[Words::kLanes], t[Words::kLanes], g[Words::kLanes];
    Words::widen(student.word[word], s);
    Words::widen(teacher.word[word], t);
#pragma unroll
    for (int k = 0; k < Words::kLanes; ++k) {
      g[k] = splat<F>(0);
      if constexpr (kDivergence) g[k] = at.template of_divergence<kPolynomial>(s[k], t[k]);
      if constexpr (kCrossEntropy) {
        const F of_label = at.of_cross_entropy(s[k]);
        g[k] = kDivergence ? g[k] + of_label : of_label;
      }
      g[k] = at.template before_softcap<kCapped>(g[k], s[k]);
    }
    pack.word[word] = Words::narrow(g);
  };
#pragma unroll
  for (int word = 0; word < kWords; word += 2) {
    write.template operator()<false>(word);
    write.template operator()<true>(word + 1);
  }
  return pack;
}

}  // namespace gkd::cuda
