// The softcap on a GPU: one block bounds a row's logits.
//
// `out` may be the logits: a thread writes an element only after it has read it, and no other thread reads it.

#include "../softcap.h"
#include "../switches.h"
#include "launch.cuh"
#include "passes.h"
#include "walk.cuh"

namespace gkd::cuda {
namespace {

template <FloatType type>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    softcap_kernel(const __grid_constant__ SoftcapParams params, bool alike) {
  constexpr int kLanes = Walk<type>::kLanes;
  using Element = typename Storage<type>::Element;
  const int64_t i = blockIdx.x;
  const auto* row = student_row<type>(params.logits, i);
  Element* out = static_cast<Element*>(params.out) + i * params.out_stride;
  const Walk<type> walk(row, params.logits.columns, alike);
  walk.template for_each<kBatch>({row}, [&](int first, const Pack(&packs)[1], auto is_whole) {
    float z[kLanes];
    widen<type>(packs[0], z);
#pragma unroll
    for (int k = 0; k < kLanes; ++k) z[k] = gkd::softcap(z[k], params.cap);
    walk.store(out, first, narrow<type>(z), is_whole);
  });
}

}  // namespace

void softcap(const SoftcapParams& params, void* stream) {
  const Logits& logits = params.logits;
  const bool alike = lie_alike(params.out, params.out_stride, logits.student, logits.student_stride, logits.type);
  GKD_TYPE_SWITCH(logits.type, [&] { launch(softcap_kernel<kType>, logits.rows, stream, params, alike); });
}

}  // namespace gkd::cuda
