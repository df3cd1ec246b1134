// Statistics, sums and gradient in one read and one write: a cluster of blocks holds a row in shared memory.
//
// Needs the whole vocabulary on this GPU, as the passes follow each other without a collective. Blocks stay for many
// rows: a cluster takes each `clusters`-th one. `out` may be the student's or the teacher's logits: a row is only
// written by the threads that have copied it.

#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "../gradient_row.h"
#include "../switches.h"
#include "add_packs.cuh"
#include "cluster.cuh"
#include "cluster_row.cuh"
#include "gradient_pack.cuh"
#include "passes.h"
#include "reduce.cuh"

namespace gkd::cuda {
namespace {

constexpr float kInfinite = std::numeric_limits<float>::infinity();

using LossCluster = Cluster<kClusterThreads>;

// Before the row in shared memory.
constexpr int kReductionBytes = (sizeof(LossCluster::Memory) + 127) / 128 * 128;

// The sums of StatisticsColumn, relative to the maxima, and where the maxima are.
enum RowSum { kSum, kOtherSum, kMoment, kGap, kOtherMoment, kOtherGap, kUntemperedSum, kRowSums };

struct AddThenSmaller {
  __device__ __forceinline__ float operator()(int i, float x, float y) const {
    return i < kRowSums ? x + y : fminf(x, y);
  }
};

// A row's largest logit as the reference of its sums, in bits. Rounding the product once makes each term one fused
// multiply-add; `rest` is what the rounding has taken from the maximum's term, which would be 0.
struct Reference {
  float logit, bits, rest;

  __device__ __forceinline__ Reference(float maximum, float scale)
      : logit(maximum == -kInfinite ? 0 : maximum),
        bits(logit * scale),
        rest(bits - bits == 0 ? fmaf(logit, scale, -bits) : 0) {}
};

// One model's shift and bias, from the sum of 2^(scale (z - logit)): see RowNormalizers. With log2(sum) in two parts
// and a difference with its rounding error, the bias is as exact as the sum.
struct Normalizer {
  float shift, bias;

  __device__ __forceinline__ Normalizer(float logit, float sum, float scale) {
    const float whole = floorf(log2f(sum)), part = log2f(sum * exp2(-whole));
    shift = logit + divide(whole + part, scale);
    const float distance = shift - logit, back = shift - distance;
    const float lost = (shift - (distance + (shift - distance))) - (logit - back);
    bias = fmaf(-scale, distance, whole) + (part - scale * lost);
  }
};

__device__ __forceinline__ bool is_nan(float x) { return x != x; }

// A pack's sums. An excluded entry must add nothing, but 0 * -inf is NaN: only `kGuarded` avoids that. It is rarely
// run, so its loop is not unrolled: the first words are used, and then dropped.
template <FloatType type, bool kUntempered, bool kGuarded>
__device__ __forceinline__ void add_up(Pack student_pack, Pack teacher_pack, const Reference (&references)[3],
                                       const StatisticsParams& params, float (&sums)[kRowSums]) {
  constexpr int kPerWord = Storage<type>::kPerWord;
#pragma unroll
  for (int i = 0; i < kRowSums; ++i) sums[i] = 0;
#pragma unroll(kGuarded ? 1 : kWords)
  for (int i = 0; i < kWords; ++i) {
    float s[kPerWord], t[kPerWord];
    Storage<type>::widen(student_pack.word[kGuarded ? 0 : i], s);
    Storage<type>::widen(teacher_pack.word[kGuarded ? 0 : i], t);
#pragma unroll
    for (int k = 0; k < kPerWord; ++k) {
      const float student = fmaf(s[k], params.scale, -references[0].bits);
      const float teacher = fmaf(t[k], params.scale, -references[1].bits);
      const float student_e = exp2(student), teacher_e = exp2(teacher), difference = student - teacher;
      const bool in_student = !kGuarded || student_e != 0, in_teacher = !kGuarded || teacher_e != 0;
      sums[kSum] += student_e;
      sums[kOtherSum] += teacher_e;
      sums[kMoment] += student_e * (in_student ? student : 0.0f);
      sums[kGap] += student_e * (in_student ? difference : 0.0f);
      sums[kOtherMoment] += teacher_e * (in_teacher ? teacher : 0.0f);
      sums[kOtherGap] -= teacher_e * (in_teacher ? difference : 0.0f);
      if constexpr (kUntempered) {
        sums[kUntemperedSum] += exp2(fmaf(s[k], params.untempered_scale, -references[2].bits));
      }
    }
    if constexpr (kGuarded) {
      student_pack = {{student_pack.word[1], student_pack.word[2], student_pack.word[3], student_pack.word[3]}};
      teacher_pack = {{teacher_pack.word[1], teacher_pack.word[2], teacher_pack.word[3], teacher_pack.word[3]}};
    }
  }
}

// From sums relative to the references in bits to sums relative to the maxima.
__device__ __forceinline__ void make_exact(float* sums, const Reference (&references)[3]) {
  const float student = references[0].rest, teacher = references[1].rest;
  const float student_factor = exp2(-student), teacher_factor = exp2(-teacher);
  sums[kMoment] = student_factor * (sums[kMoment] - student * sums[kSum]);
  sums[kGap] = student_factor * (sums[kGap] - (student - teacher) * sums[kSum]);
  sums[kSum] *= student_factor;
  sums[kOtherMoment] = teacher_factor * (sums[kOtherMoment] - teacher * sums[kOtherSum]);
  sums[kOtherGap] = teacher_factor * (sums[kOtherGap] - (teacher - student) * sums[kOtherSum]);
  sums[kOtherSum] *= teacher_factor;
  sums[kUntemperedSum] *= exp2(-references[2].rest);
}

// One row, by all threads of a cluster.
template <FloatType type, class Form>
struct RowLoss {
  using F = Lane<type, Form>;
  using Words = Word<type, F>;
  using Held = HeldRow<type>;

  const LossParams& params;
  const Weights& weights;
  Held& held;
  LossCluster& cluster;
  int64_t row;
  typename Held::RowWalk walk;

  struct Statistics {
    float maxima[2];
    float sums[kRowSums + 2];  // and the tops

    __device__ __forceinline__ bool has_other_untempered(const StatisticsParams& params) const {
      return params.untempered_scale != 0 && params.untempered_scale != params.scale;
    }
  };

  template <bool kUntempered>
  __device__ __forceinline__ void add_row(const Reference (&references)[3], float* sums) const {
    held.template for_each<false>(walk, [&](int, const auto& packs) {
      float of_pack[kRowSums];  // a pack's sums first: they round less than one long sum
      const auto& [student, teacher] = packs.of_model;
      add_up<type, kUntempered, false>(student, teacher, references, params.statistics, of_pack);
      if (is_nan(of_pack[kMoment] + of_pack[kGap] + of_pack[kOtherMoment] + of_pack[kOtherGap])) {
        add_up<type, kUntempered, true>(student, teacher, references, params.statistics, of_pack);
      }
#pragma unroll
      for (int i = 0; i < kRowSums; ++i) sums[i] += of_pack[i];
    });
  }

  // The lowest column of `value` in one model's pack.
  __device__ __forceinline__ float find(int model, int first, float value) const {
    float z[Held::RowWalk::kLanes];
    widen<type>(held.pack(walk, model, first), z);
    int column = 0;
#pragma unroll
    for (int k = Held::RowWalk::kLanes - 1; k >= 0; --k) column = z[k] == value ? walk.column(first, k) : column;
    return float(column);  // exact: a row that fits has fewer than 2^24 columns
  }

  __device__ __forceinline__ Statistics statistics() const {
    const StatisticsParams& of = params.statistics;
    Statistics result = {{-kInfinite, -kInfinite}, {}};
    float own[2] = {-kInfinite, -kInfinite};
    int tops[2] = {-1, -1};  // the first pack with the thread's maximum
    held.template for_each<true>(walk, [&](int first, const auto& packs) {
#pragma unroll
      for (int model = 0; model < 2; ++model) {
        const float most = Storage<type>::maximum(packs.of_model[model]);
        tops[model] = most > own[model] ? first : tops[model];
        own[model] = fmaxf(most, own[model]);
      }
    });
#pragma unroll
    for (int model = 0; model < 2; ++model) result.maxima[model] = own[model];
    cluster.reduce(result.maxima, OfAll<Larger>());

    const Reference references[3] = {Reference(result.maxima[0], of.scale), Reference(result.maxima[1], of.scale),
                                     Reference(result.maxima[0], of.untempered_scale)};
    if (result.has_other_untempered(of)) {
      add_row<true>(references, result.sums);
    } else {
      add_row<false>(references, result.sums);
    }
#pragma unroll
    for (int model = 0; model < 2; ++model) {
      const bool is_here = own[model] != -kInfinite && own[model] == result.maxima[model];
      result.sums[kRowSums + model] = is_here ? find(model, tops[model], own[model]) : kInfinite;
    }
    cluster.reduce(result.sums, AddThenSmaller());
    make_exact(result.sums, references);
    if (!result.has_other_untempered(of)) result.sums[kUntemperedSum] = result.sums[kSum];
    return result;
  }

  __device__ __forceinline__ void write(const Statistics& found) const {
    if (cluster.rank() != 0 || threadIdx.x != 0) return;
    const bool untempered = params.statistics.untempered_scale != 0;
    float* out = params.statistics.out + row * (kMomentColumns + (untempered ? 1 : 0));
    const auto top = [&](int model) {
      const float column = found.sums[kRowSums + model];
      return float(params.statistics.first + (column == kInfinite ? 0 : int(column)));
    };
    out[kStudentMaximum] = found.maxima[0];
    out[kStudentSum] = found.sums[kSum];
    out[kTeacherMaximum] = found.maxima[1];
    out[kTeacherSum] = found.sums[kOtherSum];
    out[kStudentMoment] = found.sums[kMoment];
    out[kStudentGap] = found.sums[kGap];
    out[kStudentTop] = top(0);
    out[kTeacherMoment] = found.sums[kOtherMoment];
    out[kTeacherGap] = found.sums[kOtherGap];
    out[kTeacherTop] = top(1);
    if (untempered) out[kMomentColumns] = found.sums[kUntemperedSum];
  }

  // The sum of slopes, which the statistics hold for the KL divergences. For the others, both sums are also written.
  __device__ __forceinline__ float slope_sum(const Statistics& found, const RowNormalizers& n) const {
    if constexpr (std::is_same_v<Form, fast::ForwardKl>) {
      return 0;
    } else if constexpr (std::is_same_v<Form, fast::ReverseKl>) {
      const float bits = found.sums[kGap] / found.sums[kSum] - log2f(found.sums[kSum]) + log2f(found.sums[kOtherSum]);
      return at_least(kLn2 * bits, 0.0f);
    } else {
      const Form form(weights, Normalization{params.gradient.scale, n});
      F values = splat<F>(0), slopes = splat<F>(0);
      held.template for_each<false>(walk, [&](int, const auto& packs) {
        add_packs<Words>(form, packs.of_model[0], packs.of_model[1], values, slopes);
      });
      float sums[2] = {total(values), total(slopes)};
      cluster.reduce(sums, OfAll<Add>());
      const RowSums of_row(form, sums[0], sums[1]);
      sums[0] = of_row.value;
      sums[1] = of_row.slope;
      if (cluster.rank() == 0 && threadIdx.x == 0) {
        params.sums[2 * row] = sums[0];
        params.sums[2 * row + 1] = sums[1];
      }
      return sums[1];
    }
  }

  // The gradient at the label is computed before the others, which then need not know the label, and written after them
  // by the thread that has its column.
  template <bool kDivergence, bool kCrossEntropy>
  __device__ __forceinline__ void write_pieces(const GradientRow<Form>& at, typename Held::Element* out,
                                               int64_t next) const {
    const bool has_label = at.label_factor != 0 && walk.is_mine(int(params.gradient.label[row]));
    const int label = has_label ? int(params.gradient.label[row]) : 0;
    float of_label = 0;
    if (has_label) {
      const float s = held.logit(walk, 0, label);
      if constexpr (kDivergence) of_label += at.of_divergence(s, held.logit(walk, 1, label));
      if constexpr (kCrossEntropy) of_label += at.of_cross_entropy(s);
    }
    held.for_each_then_start(walk, next, [&](int first, const auto& packs) {
      const auto& [student, teacher] = packs.of_model;
      walk.store(out, first, gradient_pack<type, false, kDivergence, kCrossEntropy>(at, student, teacher));
    });
    if (has_label) write_one<type>(out + label, of_label - at.label_factor);
  }

  // Starts the copies of row `next`.
  __device__ __forceinline__ void write_gradient(const GradientRow<Form>& at, int64_t next) const {
    const GradientParams& of = params.gradient;
    auto* out = static_cast<typename Held::Element*>(of.out) + row * of.out_stride;
    for (int64_t j = of.logits.columns + threadIdx.x; cluster.rank() == 0 && j < of.width; j += kClusterThreads) {
      out[j] = 0;
    }
    const bool with_divergence = of.weight[row] != 0, with_label = at.label_factor != 0;
    if (with_divergence && (!with_label || at.shares_label)) return write_pieces<true, false>(at, out, next);
    if (with_divergence) return write_pieces<true, true>(at, out, next);
    if (with_label) return write_pieces<false, true>(at, out, next);
    write_pieces<false, false>(at, out, next);
  }

  __device__ __forceinline__ void run(int64_t next) const {
    const Statistics found = statistics();
    write(found);
    const float scale = params.gradient.scale;
    const Normalizer student(Reference(found.maxima[0], scale).logit, found.sums[kSum], scale);
    const Normalizer teacher(Reference(found.maxima[1], scale).logit, found.sums[kOtherSum], scale);
    const RowNormalizers n = {student.shift, student.bias, teacher.shift, teacher.bias};
    const Normalizer untempered(Reference(found.maxima[0], kLog2E).logit, found.sums[kUntemperedSum], kLog2E);
    const GradientInputs inputs = {n,
                                   slope_sum(found, n),
                                   params.gradient.weight[row],
                                   params.gradient.label_weight == nullptr ? 0 : params.gradient.label_weight[row],
                                   untempered.shift,
                                   untempered.bias};
    write_gradient(GradientRow<Form>(params.gradient, weights, inputs), next);
  }
};

template <FloatType type, class Form>
__global__ void __launch_bounds__(kClusterThreads, 1)
    cluster_loss_kernel([[maybe_unused]] const __grid_constant__ LossParams params,
                        [[maybe_unused]] const __grid_constant__ Weights weights, [[maybe_unused]] int share_columns,
                        [[maybe_unused]] bool alike) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  auto* memory = static_cast<unsigned char*>(dynamic_memory());
  const int64_t clusters = gridDim.x / LossCluster::blocks();
  const int64_t first = blockIdx.x / LossCluster::blocks();
  const Share share = {LossCluster::rank(), share_columns};
  HeldRow<type> held(memory + kReductionBytes, params.gradient.logits, share, alike);
  held.start(first);
  LossCluster cluster(reinterpret_cast<LossCluster::Memory*>(memory));
  for (int64_t row = first; row < params.gradient.logits.rows; row += clusters) {
    const RowLoss<type, Form> loss = {params, weights, held, cluster, row, held.walk(row)};
    loss.run(row + clusters);
  }
#endif
}

}  // namespace
}  // namespace gkd::cuda
