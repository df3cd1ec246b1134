// The third pass on a GPU: one block writes a row's gradient. Two files compile it, with and without a softcap.
//
// `out` may be the student's or the teacher's logits: a thread writes an element only after it has read it, and no
// other thread reads it.

#pragma once

#include "../gradient_row.h"
#include "../switches.h"
#include "launch.cuh"
#include "passes.h"
#include "walk.cuh"

namespace gkd::cuda {
namespace {

template <FloatType type>
__device__ __forceinline__ void zero_fill(typename Storage<type>::Element* from, int64_t count) {
  const Walk<type> walk(from, count, true);
  for (int first = walk.begin; first < walk.columns; first += Walk<type>::kStride) walk.store(from, first, Pack{});
}

template <FloatType type, bool kCapped, bool kDivergence, bool kCrossEntropy, class Functor>
__device__ __forceinline__ void write_row(const GradientParams& params, const GradientRow<Functor>& at, int64_t i,
                                          typename Storage<type>::Element* out, bool alike) {
  constexpr int kPerWord = Storage<type>::kPerWord;
  const auto* student = student_row<type>(params.logits, i);
  [[maybe_unused]] const int label = kCrossEntropy ? int(params.label[i]) : -1;
  const Walk<type> walk(student, params.logits.columns, alike);
  const auto write = [&](int first, const auto& packs) {
    Pack pack;
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      float s[kPerWord], t[kPerWord], g[kPerWord];
      Storage<type>::widen(packs[0].word[word], s);
      Storage<type>::widen(packs[kDivergence ? 1 : 0].word[word], t);
#pragma unroll
      for (int k = 0; k < kPerWord; ++k) {
        g[k] = 0;
        if constexpr (kDivergence) g[k] += at.of_divergence(s[k], t[k]);
        if constexpr (kCrossEntropy) {
          g[k] += at.of_cross_entropy(s[k]);
          if (walk.column(first, word * kPerWord + k) == label) g[k] -= at.label_factor;
        }
        g[k] = at.template before_softcap<kCapped>(g[k], s[k]);
      }
      pack.word[word] = Storage<type>::narrow(g);
    }
    walk.store(out, first, pack);
  };
  if constexpr (kDivergence) {
    walk.for_each({student, teacher_row<type>(params.logits, i)}, write);
  } else {
    walk.for_each({student}, write);
  }
}

// With the cross-entropy 64 registers are too few.
template <FloatType type, class Functor, bool kCapped, bool kCrossEntropy>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor - (kCrossEntropy ? 1 : 0))
    gradient_kernel(const __grid_constant__ GradientParams params, const __grid_constant__ Functor divergence,
                    bool alike) {
  using Element = typename Storage<type>::Element;
  const int64_t i = blockIdx.x;
  const GradientRow<Functor> at(params, divergence, i);
  Element* out = static_cast<Element*>(params.out) + i * params.out_stride;
  const bool with_divergence = params.weight != nullptr && params.weight[i] != 0;
  const bool with_label = kCrossEntropy && at.label_factor != 0;
  // Zeros first, so that they need no registers during the loop.
  const int64_t first_zero = with_divergence || with_label ? params.logits.columns : 0;
  zero_fill<type>(out + first_zero, params.width - first_zero);
  if (with_divergence && !with_label) {
    write_row<type, kCapped, true, false>(params, at, i, out, alike);
  } else if (kCrossEntropy && with_divergence) {
    write_row<type, kCapped, true, kCrossEntropy>(params, at, i, out, alike);
  } else if (kCrossEntropy && with_label) {
    write_row<type, kCapped, false, kCrossEntropy>(params, at, i, out, alike);
  }
}

template <bool kCapped>
void start_gradient(const GradientParams& params, void* stream) {
  const Logits& logits = params.logits;
  const bool alike =
      lie_alike(logits) && lie_alike(params.out, params.out_stride, logits.student, logits.student_stride, logits.type);
  GKD_TYPE_SWITCH(logits.type, [&] {
    GKD_MATH_SWITCH(kType, params.beta, Math, [&] {
      GKD_DIVERGENCE_SWITCH(params.kind, Math, [&] {
        GKD_BOOL_SWITCH(params.label_weight != nullptr, kCrossEntropy, [&] {
          const Functor divergence{Functor::weights(params.beta)};
          launch(gradient_kernel<kType, Functor, kCapped, kCrossEntropy>, logits.rows, stream, params, divergence,
                 alike);
        });
      });
    });
  });
}

}  // namespace
}  // namespace gkd::cuda
