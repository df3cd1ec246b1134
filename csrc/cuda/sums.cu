// The second pass on a GPU: one block sums a row's values and slopes.

#include "../switches.h"
#include "add_packs.cuh"
#include "cluster_launch.cuh"
#include "passes.h"
#include "reduce.cuh"
#include "walk.cuh"

namespace gkd::cuda {
namespace {

// Blocks on a multiprocessor.
template <class Form>
constexpr int kBlocksOf = kBlocksPerMultiprocessor - Form::kNeedsRegisters;

// With two floats side by side, the powers of two of every second word are computed by a polynomial: of two for each
// entry, that is a quarter.
template <FloatType type, class Form>
__global__ void __launch_bounds__(kThreads, kBlocksOf<Form>)
    sums_kernel(const __grid_constant__ SumsParams params, const __grid_constant__ Weights weights, bool alike,
                int share_columns) {
  using F = Lane<type, Form>;
  using Words = Word<type, F>;
  using RowCluster = Cluster<kThreads>;
  const int64_t i = blockIdx.x / RowCluster::blocks();
  const bool is_first = RowCluster::rank() == 0;
  float* out = params.out + 2 * i;
  if (params.mask != nullptr && params.mask[i] == 0) {
    if (is_first && threadIdx.x < 2) out[threadIdx.x] = 0;
    return;
  }
  const Form form(weights, Normalization{params.scale, params.normalizers[i]});
  const auto* student = student_row<type>(params.logits, i);
  const auto* teacher = teacher_row<type>(params.logits, i);
  F values = splat<F>(0), slopes = splat<F>(0);
  const Share share = {RowCluster::rank(), share_columns};
  const Walk<type> walk(student, params.logits.columns, alike, share);
  walk.template for_each<kBatchOf<Form>>({student, teacher}, [&](int, const Pack(&packs)[2], auto) {
    add_packs<Words>(form, packs[0], packs[1], values, slopes);
  });
  float sums[2] = {total(values), total(slopes)};
  RowCluster cluster(static_cast<RowCluster::Memory*>(dynamic_memory()));
  cluster.reduce(sums, OfAll<Add>());
  if (is_first && threadIdx.x == 0) {
    const RowSums of_row(form, sums[0], sums[1]);
    out[0] = of_row.value;
    out[1] = of_row.slope;
  }
}

}  // namespace

void sums(const SumsParams& params, void* stream) {
  GKD_TYPE_SWITCH(params.logits.type, [&] {
    GKD_FORM_SWITCH(kType, params.kind, params.beta, [&](const Weights& weights) {
      launch_shared<kType>(sums_kernel<kType, Form>, params.logits, stream, params, weights, lie_alike(params.logits));
    });
  });
}

}  // namespace gkd::cuda
