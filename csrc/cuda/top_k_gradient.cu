// The gradient of the loss over a top-k on a GPU: what is special in each row first, then whole rows.

#include "../switches.h"
#include "launch.cuh"
#include "top_k.cuh"
#include "top_k.h"

namespace gkd::cuda {
namespace {

template <FloatType type>
__global__ void __launch_bounds__(kThreads, 1) top_k_prepare_kernel(const __grid_constant__ TopKGradientParams params) {
  const int64_t i = blockIdx.x;
  prepare_row<Reader<type>>(params, i, student_row<type>(params.logits, i), Team());
}

template <FloatType type, bool kBucket, bool kLabels, bool kCapped>
__device__ __forceinline__ void write_others(const TopKGradientParams& params, const TopKOthers& others, int64_t i,
                                             typename Storage<type>::Element* out, bool alike) {
  constexpr int kPerWord = Storage<type>::kPerWord;
  const auto* row = student_row<type>(params.logits, i);
  const Walk<type> walk(row, params.logits.columns, alike);
  walk.template for_each<kBatch>({row}, [&](int first, const Pack(&packs)[1], auto is_whole) {
    Pack pack;
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      float z[kPerWord];
      Storage<type>::widen(packs[0].word[word], z);
#pragma unroll
      for (int k = 0; k < kPerWord; ++k) {
        const float g = of_other<kBucket, kLabels>(others, params.scale, z[k]);
        z[k] = kCapped ? g * softcap_slope(z[k], params.inverse_softcap) : g;
      }
      pack.word[word] = Storage<type>::narrow(z);
    }
    walk.store(out, first, pack, is_whole);
  });
}

// `out` may be the logits: what is special was computed before.
// Which parts there are depends on the loss; a row where one has weight 0 computes it all the same, times 0.
template <FloatType type, bool kBucket, bool kLabels, bool kCapped>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    top_k_gradient_kernel(const __grid_constant__ TopKGradientParams params, bool alike) {
  using Element = typename Storage<type>::Element;
  const int64_t i = blockIdx.x, columns = params.logits.columns, k = params.tokens.k;
  Element* out = static_cast<Element*>(params.out) + i * params.out_stride;
  const TopKOthers others = params.others[i];
  const int64_t first_zero = others.is_zero || !(kBucket || kLabels) ? 0 : columns;
  const Walk<type> zeros(out + first_zero, params.width - first_zero, true);
  for (int first = zeros.begin; first < zeros.columns; first += Walk<type>::kStride) {
    zeros.store(out + first_zero, first, Pack{});
  }
  if (others.is_zero) return;
  if constexpr (kBucket || kLabels) write_others<type, kBucket, kLabels, kCapped>(params, others, i, out, alike);
  __syncthreads();
  if (threadIdx.x == 0 && others.label >= 0) Reader<type>::write(out, others.label, others.at_label);
  for (int64_t j = threadIdx.x; j < k; j += kThreads) {
    const int64_t column = own_column(params.tokens, columns, i, j);
    if (column >= 0) Reader<type>::write(out, column, params.at_tokens[i * k + j]);
  }
}

}  // namespace

void top_k_gradient(const TopKGradientParams& params, void* stream) {
  const Logits& logits = params.logits;
  const bool alike = lie_alike(params.out, params.out_stride, logits.student, logits.student_stride, logits.type);
  GKD_TYPE_SWITCH(logits.type, [&] {
    launch(top_k_prepare_kernel<kType>, logits.rows, stream, params);
    GKD_BOOL_SWITCH(params.inverse_softcap != 0, kCapped, [&] {
      GKD_BOOL_SWITCH(params.tokens.tail != nullptr, kBucket, [&] {
        GKD_BOOL_SWITCH(params.label_weight != nullptr, kLabels, [&] {
          launch(top_k_gradient_kernel<kType, kBucket, kLabels, kCapped>, logits.rows, stream, params, alike);
        });
      });
    });
  });
}

}  // namespace gkd::cuda
