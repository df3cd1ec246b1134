// The second pass on a GPU: one block sums a row's values and slopes.

#include "../divergences.h"
#include "../switches.h"
#include "launch.cuh"
#include "passes.h"
#include "reduce.cuh"
#include "walk.cuh"

namespace gkd::cuda {
namespace {

template <FloatType type, class Functor>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    sums_kernel(const __grid_constant__ SumsParams params, const __grid_constant__ Functor divergence, bool alike) {
  constexpr int kLanes = Walk<type>::kLanes;
  const int64_t i = blockIdx.x;
  float* out = params.out + 2 * i;
  if (params.mask != nullptr && params.mask[i] == 0) {
    if (threadIdx.x < 2) out[threadIdx.x] = 0;
    return;
  }
  const RowNormalizers n = params.normalizers[i];
  const auto* student = student_row<type>(params.logits, i);
  const auto* teacher = teacher_row<type>(params.logits, i);
  float sums[2] = {};
  const Walk<type> walk(student, params.logits.columns, alike);
  walk.for_each({student, teacher}, [&](int, const Pack(&packs)[2]) {
    float s[kLanes], t[kLanes];
    widen<type>(packs[0], s);
    widen<type>(packs[1], t);
    float value = 0, slope = 0;  // a pack's sums first: they round less than one long sum
#pragma unroll
    for (int k = 0; k < kLanes; ++k) {
      const Terms<float> terms = divergence(log2_prob(s[k], params.scale, n.student_shift, n.student_bias),
                                            log2_prob(t[k], params.scale, n.teacher_shift, n.teacher_bias));
      value += terms.value;
      slope += terms.slope;
    }
    sums[0] += value;
    sums[1] += slope;
  });
  block_reduce(sums, Add());
  if (threadIdx.x == 0) {
    out[0] = sums[0] * divergence.w.value_scale;
    out[1] = sums[1];
  }
}

}  // namespace

void sums(const SumsParams& params, void* stream) {
  GKD_TYPE_SWITCH(params.logits.type, [&] {
    GKD_MATH_SWITCH(kType, params.beta, Math, [&] {
      GKD_DIVERGENCE_SWITCH(params.kind, Math, [&] {
        const Functor divergence{Functor::weights(params.beta)};
        launch(sums_kernel<kType, Functor>, params.logits.rows, stream, params, divergence, lie_alike(params.logits));
      });
    });
  });
}

}  // namespace gkd::cuda
