// The third pass on a GPU: one block writes a row's gradient. Two files compile it, with and without a softcap.
//
// `out` may be the student's or the teacher's logits: a thread writes an element only after it has read it, and no
// other thread reads it.

#pragma once

#include <type_traits>

#include "../gradient_row.h"
#include "../switches.h"
#include "cluster_launch.cuh"
#include "gradient_pack.cuh"
#include "passes.h"
#include "walk.cuh"

namespace gkd::cuda {
namespace {

template <FloatType type>
__device__ __forceinline__ void zero_fill(typename Storage<type>::Element* from, int64_t count) {
  const Walk<type> walk(from, count, true);
  for (int first = walk.begin; first < walk.columns; first += Walk<type>::kStride) walk.store(from, first, Pack{});
}

// The gradient at a row's label, computed before the loop, which may overwrite the logits, and written after it by the
// thread that has its column: so the loop need not know the label.
template <FloatType type, bool kCapped, bool kDivergence, bool kCrossEntropy, class Form>
struct LabelEntry {
  int column = -1;
  float gradient = 0;

  __device__ __forceinline__ LabelEntry(const GradientParams& params, const GradientRow<Form>& at, int64_t i,
                                        const Walk<type>& walk) {
    if (at.label_factor == 0 || !walk.is_mine(int(params.label[i]))) return;
    column = int(params.label[i]);
    const float s = read_one<type>(student_row<type>(params.logits, i) + column);
    if constexpr (kDivergence)
      gradient += at.of_divergence(s, read_one<type>(teacher_row<type>(params.logits, i) + column));
    if constexpr (kCrossEntropy) gradient += at.of_cross_entropy(s);
    gradient = at.template before_softcap<kCapped>(gradient - at.label_factor, s);
  }

  __device__ __forceinline__ void write(typename Storage<type>::Element* out) const {
    if (column >= 0) write_one<type>(out + column, gradient);
  }
};

template <FloatType type, bool kCapped, bool kDivergence, bool kCrossEntropy, class Form>
__device__ __forceinline__ void write_row(const GradientParams& params, const GradientRow<Form>& at, int64_t i,
                                          typename Storage<type>::Element* out, bool alike, const Share& share) {
  const auto* student = student_row<type>(params.logits, i);
  const Walk<type> walk(student, params.logits.columns, alike, share);
  const LabelEntry<type, kCapped, kDivergence, kCrossEntropy, Form> label(params, at, i, walk);
  const auto write = [&](int first, const auto& packs, auto is_whole) {
    const Pack& teacher = packs[kDivergence ? 1 : 0];
    const Pack pack = gradient_pack<type, kCapped, kDivergence, kCrossEntropy>(at, packs[0], teacher);
    walk.store(out, first, pack, is_whole);
  };
  if constexpr (kDivergence) {
    walk.template for_each<kBatchOf<Form>>({student, teacher_row<type>(params.logits, i)}, write);
  } else {
    walk.template for_each<kBatch>({student}, write);
  }
  label.write(out);
}

template <class Form>
constexpr bool kIsSkewed = std::is_same_v<Form, fast::SkewedForwardKl> || std::is_same_v<Form, fast::SkewedReverseKl>;

// Blocks on a multiprocessor: with the cross-entropy 64 registers are too few, and sometimes 80.
template <class Form, bool kCapped, bool kCrossEntropy>
constexpr int kGradientBlocks =
    kBlocksPerMultiprocessor - (kCrossEntropy || Form::kNeedsRegisters) -
    ((kCapped && Form::kNeedsRegisters) || (kCrossEntropy && (!Form::kFast || kIsSkewed<Form>)));

template <FloatType type, class Form, bool kCapped, bool kCrossEntropy>
__global__ void __launch_bounds__(kThreads, kGradientBlocks<Form, kCapped, kCrossEntropy>)
    gradient_kernel(const __grid_constant__ GradientParams params, const __grid_constant__ Weights weights, bool alike,
                    int share_columns) {
  using Element = typename Storage<type>::Element;
  using RowCluster = Cluster<kThreads>;
  const int64_t i = blockIdx.x / RowCluster::blocks();
  const Share share = {RowCluster::rank(), share_columns};
  const GradientRow<Form> at(params, weights, i, kCrossEntropy);
  Element* out = static_cast<Element*>(params.out) + i * params.out_stride;
  const bool with_divergence = params.weight != nullptr && params.weight[i] != 0;
  const bool with_label = kCrossEntropy && at.label_factor != 0;
  // Zeros first, so that they need no registers during the loop.
  const int64_t first_zero = with_divergence || with_label ? params.logits.columns : 0;
  if (share.index == 0) zero_fill<type>(out + first_zero, params.width - first_zero);
  if (with_divergence && (!with_label || at.shares_label)) {
    write_row<type, kCapped, true, false>(params, at, i, out, alike, share);
  } else if (kCrossEntropy && with_divergence) {
    write_row<type, kCapped, true, kCrossEntropy>(params, at, i, out, alike, share);
  } else if (kCrossEntropy && with_label) {
    write_row<type, kCapped, false, kCrossEntropy>(params, at, i, out, alike, share);
  }
}

template <bool kCapped>
void start_gradient(const GradientParams& params, void* stream) {
  const Logits& logits = params.logits;
  const bool alike =
      lie_alike(logits) && lie_alike(params.out, params.out_stride, logits.student, logits.student_stride, logits.type);
  GKD_TYPE_SWITCH(logits.type, [&] {
    GKD_FORM_SWITCH(kType, params.kind, params.beta, [&](const Weights& weights) {
      GKD_BOOL_SWITCH(params.label_weight != nullptr, kCrossEntropy, [&] {
        launch_shared<kType>(gradient_kernel<kType, Form, kCapped, kCrossEntropy>, logits, stream, params, weights,
                             alike);
      });
    });
  });
}

}  // namespace
}  // namespace gkd::cuda
