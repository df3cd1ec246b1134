// The first pass on a GPU: one block reads a row of both models once, and keeps sums relative to a moving reference.

#include <limits>

#include "../divergences.h"
#include "../switches.h"
#include "cluster_launch.cuh"
#include "passes.h"
#include "reduce.cuh"
#include "walk.cuh"

namespace gkd::cuda {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kNowhere = std::numeric_limits<int>::max();
constexpr float kSlackBits = 8;  // how far terms may exceed 1 before the reference follows the maximum

// The sums of one pack, one thread or one row, in bits; see StatisticsColumn.
template <class F>
struct ModelSums {
  F sum, moment, gap, untempered;

  __device__ __forceinline__ ModelSums() : sum(splat<F>(0)), moment(sum), gap(sum), untempered(sum) {}

  template <class Other>
  __device__ __forceinline__ void operator+=(const ModelSums<Other>& other) {
    sum += total(other.sum);
    moment += total(other.moment);
    gap += total(other.gap);
    untempered += total(other.untempered);
  }
};

// By how many bits a reference fell, at the temperature of the loss and untempered.
struct Shift {
  float bits = 0, untempered = 0;
};

// One model's sums over the columns that one thread has read. Terms are 2^(scale z - reference), where the reference is
// near scale times the maximum, or 0 as long as there is none: as it moves rarely, moving it costs next to nothing. It is
// a number of bits, so that one multiply-add gives an exponent.
struct RunningModel {
  float maximum = -kInfinity;
  int top = kNowhere;  // where the pack starts that holds the maximum, the first such
  float reference = 0, untempered_reference = 0;
  float bound = -kInfinity;  // a logit above this moves the reference
  ModelSums<float> sums;

  __device__ __forceinline__ void update_maximum(float candidate, int first) {
    top = candidate > maximum ? first : top;
    maximum = fmaxf(candidate, maximum);
  }

  __device__ __forceinline__ Shift follow(float candidate, float slack, const StatisticsParams& params) {
    if (!(candidate > bound)) return {};
    bound = candidate + slack;
    const float bits = candidate * params.scale, untempered = candidate * params.untempered_scale;
    const Shift shift = {reference - bits, untempered_reference - untempered};
    reference = bits;
    untempered_reference = untempered;
    return shift;
  }

  // From the reference to a logit's exact number of bits, which fp32 may not hold.
  __device__ __forceinline__ Shift shift_to(float logit, const StatisticsParams& params) const {
    const float to = logit == -kInfinity ? 0 : logit;
    return {fused(-to, params.scale, reference), fused(-to, params.untempered_scale, untempered_reference)};
  }

  // After both models' references fell.
  __device__ __forceinline__ void rescale(const Shift& own_shift, const Shift& other_shift) {
    if (sums.sum == 0) return;
    const float own = at_least(own_shift.bits, kImpossible), factor = exp2(own);
    sums.moment = factor * (sums.moment + own * sums.sum);
    sums.sum *= factor;
    // 0, not NaN, where it was infinite
    sums.gap = factor == 0 ? 0 : factor * sums.gap + (own - other_shift.bits) * sums.sum;
    sums.untempered *= exp2(own_shift.untempered);
  }
};

// The pack without its first word; the last one stays.
__device__ __forceinline__ void drop_word(Pack& pack) {
  pack = {{pack.word[1], pack.word[2], pack.word[3], pack.word[3]}};
}

template <class F>
struct PairSums {
  ModelSums<F> student, teacher;
};

// Which columns the kernel computes. Without a teacher its sums stay 0, and the output has the columns of
// StudentStatisticsColumn. `untempered`: in a sum of its own, as the scales differ.
template <bool moments, bool untempered, bool teacher>
struct Columns {
  static constexpr bool kMoments = moments;
  static constexpr bool kUntempered = untempered;
  static constexpr bool kTeacher = teacher;
  static constexpr int kModels = teacher ? 2 : 1;
};

// What e is multiplied by, so that 0 times an infinity is 0.
__device__ __forceinline__ float guard(float e, float x) { return e != 0 ? x : 0.0f; }

// Adds the terms of an entry, or of two side by side. An excluded one must add nothing, but 0 * -inf is NaN: only
// `kGuarded`, for single floats, avoids that.
template <class Columns, bool kGuarded, class F>
__device__ __forceinline__ void add_terms(PairSums<F>& sums, F s, F t, const RunningModel& student,
                                          const RunningModel& teacher, const StatisticsParams& params) {
  const auto add = [](F& sum, F e, F x) {
    if constexpr (kGuarded) x = guard(e, x);
    sum = fused(e, x, sum);
  };
  const F scale = splat<F>(params.scale);
  const F student_bits = fused(s, scale, splat<F>(-student.reference)), student_e = exp2(student_bits);
  sums.student.sum = sums.student.sum + student_e;
  if constexpr (Columns::kMoments) add(sums.student.moment, student_e, student_bits);
  if constexpr (Columns::kTeacher) {
    const F teacher_bits = fused(t, scale, splat<F>(-teacher.reference)), teacher_e = exp2(teacher_bits);
    sums.teacher.sum = sums.teacher.sum + teacher_e;
    if constexpr (Columns::kMoments) {
      const F difference = student_bits - teacher_bits;
      add(sums.student.gap, student_e, difference);
      add(sums.teacher.moment, teacher_e, teacher_bits);
      add(sums.teacher.gap, teacher_e, -difference);
    }
  }
  if constexpr (Columns::kUntempered) {
    const F bits = fused(s, splat<F>(params.untempered_scale), splat<F>(-student.untempered_reference));
    sums.student.untempered = sums.student.untempered + exp2(bits);
  }
}

// Sums of a pack. The guarded ones are rarely computed, so their loop is not unrolled, which saves registers.
template <FloatType type, class Columns, bool kGuarded, class F>
__device__ __forceinline__ PairSums<F> add_up(Pack student_pack, Pack teacher_pack, const RunningModel& student,
                                              const RunningModel& teacher, const StatisticsParams& params) {
  using Words = Word<type, F>;
  PairSums<F> sums;
#pragma unroll(kGuarded ? 1 : kWords)
  for (int i = 0; i < kWords; ++i) {
    F s[Words::kLanes], t[Words::kLanes];
    Words::widen(student_pack.word[kGuarded ? 0 : i], s);
    Words::widen(teacher_pack.word[kGuarded ? 0 : i], t);
#pragma unroll
    for (int k = 0; k < Words::kLanes; ++k) add_terms<Columns, kGuarded>(sums, s[k], t[k], student, teacher, params);
    if constexpr (kGuarded) {
      drop_word(student_pack);
      drop_word(teacher_pack);
    }
  }
  return sums;
}

__device__ __forceinline__ bool is_nan(float x) { return x != x; }

template <FloatType type, class Columns>
__device__ __forceinline__ void take_pack(RunningModel& student, RunningModel& teacher,
                                          const Pack (&packs)[Columns::kModels], int first, float slack,
                                          const StatisticsParams& params) {
  const Pack& teacher_pack = packs[Columns::kModels - 1];  // not read without a teacher
  const float student_most = Storage<type>::maximum(packs[0]);
  const float teacher_most = Columns::kTeacher ? Storage<type>::maximum(teacher_pack) : -kInfinity;
  student.update_maximum(student_most, first);
  if constexpr (Columns::kTeacher) teacher.update_maximum(teacher_most, first);
  if (student_most > student.bound || teacher_most > teacher.bound) {
    const Shift student_shift = student.follow(student_most, slack, params);
    const Shift teacher_shift = teacher.follow(teacher_most, slack, params);
    student.rescale(student_shift, teacher_shift);
    teacher.rescale(teacher_shift, student_shift);
  }
  using F = std::conditional_t<GKD_PAIRED && type != FloatType::f32, Two, float>;
  const PairSums<F> sums = add_up<type, Columns, false, F>(packs[0], teacher_pack, student, teacher, params);
  // Where a moment is NaN, so is the gap.
  const F check = Columns::kTeacher ? sums.student.gap + sums.teacher.gap : sums.student.moment;
  if (Columns::kMoments && is_nan(total(check))) {
    const auto guarded = add_up<type, Columns, true, float>(packs[0], teacher_pack, student, teacher, params);
    student.sums += guarded.student;
    teacher.sums += guarded.teacher;
  } else {
    student.sums += sums.student;
    teacher.sums += sums.teacher;
  }
}

// The lowest column of `value` in the pack that starts at `first`.
template <FloatType type>
__device__ __forceinline__ int find(const Walk<type>& walk, const typename Storage<type>::Element* row, int first,
                                    float value) {
  Pack pack[1];
  walk.load({row}, first, pack);
  float z[Walk<type>::kLanes];
  widen<type>(pack[0], z);
  int column = kNowhere;
#pragma unroll
  for (int k = Walk<type>::kLanes - 1; k >= 0; --k) column = z[k] == value ? walk.column(first, k) : column;
  return column;
}

__device__ __forceinline__ void write_skipped(const StatisticsParams& params, int columns, float* out) {
  for (int i = threadIdx.x; i < columns; i += kThreads) {
    const bool is_sum = i == kStudentSum || i == kTeacherSum || i >= (params.moments ? kMomentColumns : kLogSumColumns);
    out[i] = is_sum ? 1 : 0;
  }
}

// With two floats side by side and moments 64 registers are too few.
template <FloatType type, class Columns>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor - (GKD_PAIRED && Columns::kMoments ? 1 : 0))
    statistics_kernel(const __grid_constant__ StatisticsParams params, bool alike, int share_columns) {
  constexpr bool kMoments = Columns::kMoments, kUntempered = Columns::kUntempered, kTeacher = Columns::kTeacher;
  using RowCluster = Cluster<kThreads>;
  const int64_t i = blockIdx.x / RowCluster::blocks();
  const bool writes = RowCluster::rank() == 0 && threadIdx.x == 0;
  const int columns = kTeacher ? statistics_columns(kMoments, params.untempered_scale != 0) : int(kAloneColumns);
  float* out = params.out + i * columns;
  if (kTeacher && params.mask != nullptr && params.mask[i] == 0) {
    if (RowCluster::rank() == 0) write_skipped(params, columns, out);
    return;
  }
  const auto* student_logits = student_row<type>(params.logits, i);
  [[maybe_unused]] const auto* teacher_logits = kTeacher ? teacher_row<type>(params.logits, i) : nullptr;
  const float slack = divide(kSlackBits, fmaxf(params.scale, params.untempered_scale));
  RunningModel student, teacher;
  const Share share = {RowCluster::rank(), share_columns};
  const Walk<type> walk(student_logits, params.logits.columns, alike, share);
  const auto body = [&](int first, const Pack(&packs)[Columns::kModels], auto) {
    take_pack<type, Columns>(student, teacher, packs, first, slack, params);
  };
  if constexpr (kTeacher) {
    walk.template for_each<kBatch>({student_logits, teacher_logits}, body);
  } else {
    walk.template for_each<kBatch>({student_logits}, body);
  }

  float maxima[2] = {student.maximum, teacher.maximum};
  RowCluster cluster(static_cast<RowCluster::Memory*>(dynamic_memory()));
  cluster.reduce(maxima, OfAll<Larger>());
  const Shift student_shift = student.shift_to(maxima[0], params), teacher_shift = teacher.shift_to(maxima[1], params);
  student.rescale(student_shift, teacher_shift);
  teacher.rescale(teacher_shift, student_shift);

  constexpr int kSums = (kMoments ? 6 : 2) + (kUntempered ? 1 : 0);
  float totals[kSums];
  totals[0] = student.sums.sum;
  totals[1] = teacher.sums.sum;
  if constexpr (kMoments) {
    totals[2] = student.sums.moment;
    totals[3] = student.sums.gap;
    totals[4] = teacher.sums.moment;
    totals[5] = teacher.sums.gap;
  }
  if constexpr (kUntempered) totals[kSums - 1] = student.sums.untempered;
  cluster.reduce(totals, OfAll<Add>());
  const float untempered = totals[kUntempered ? kSums - 1 : 0];  // the student's sum, where the scales are the same

  if constexpr (!kTeacher) {
    if (!writes) return;
    out[kAloneMaximum] = maxima[0];
    out[kAloneSum] = totals[0];
    out[kAloneMoment] = totals[2];
    out[kAloneUntempered] = untempered;
  } else {
    int tops[2] = {kNowhere, kNowhere};
    if constexpr (kMoments) {
      if (student.top != kNowhere && student.maximum == maxima[0]) {
        tops[0] = find(walk, student_logits, student.top, student.maximum);
      }
      if (teacher.top != kNowhere && teacher.maximum == maxima[1]) {
        tops[1] = find(walk, teacher_logits, teacher.top, teacher.maximum);
      }
      cluster.reduce(tops, OfAll<Smaller>());
    }

    if (!writes) return;
    out[kStudentMaximum] = maxima[0];
    out[kStudentSum] = totals[0];
    out[kTeacherMaximum] = maxima[1];
    out[kTeacherSum] = totals[1];
    if constexpr (kMoments) {
      out[kStudentMoment] = totals[2];
      out[kStudentGap] = totals[3];
      out[kStudentTop] = float(params.first + (tops[0] == kNowhere ? 0 : tops[0]));
      out[kTeacherMoment] = totals[4];
      out[kTeacherGap] = totals[5];
      out[kTeacherTop] = float(params.first + (tops[1] == kNowhere ? 0 : tops[1]));
    }
    if (params.untempered_scale != 0) out[columns - 1] = untempered;
  }
}

}  // namespace

void statistics(const StatisticsParams& params, void* stream) {
  const bool alike = lie_alike(params.logits);
  GKD_TYPE_SWITCH(params.logits.type, [&] {
    const bool other_scale = params.untempered_scale != 0 && params.untempered_scale != params.scale;
    GKD_BOOL_SWITCH(other_scale, kUntempered, [&] {
      if (!params.logits.has_teacher) {
        return launch_shared<kType>(statistics_kernel<kType, Columns<true, kUntempered, false>>, params.logits, stream,
                                    params, alike);
      }
      GKD_BOOL_SWITCH(params.moments, kMoments, [&] {
        launch_shared<kType>(statistics_kernel<kType, Columns<kMoments, kUntempered, true>>, params.logits, stream,
                             params, alike);
      });
    });
  });
}

}  // namespace gkd::cuda
