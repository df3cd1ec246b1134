// The first pass on a GPU: one block reads a row of both models once, and keeps sums relative to a moving reference.

#include <limits>

#include "../divergences.h"
#include "../switches.h"
#include "launch.cuh"
#include "passes.h"
#include "reduce.cuh"
#include "walk.cuh"

namespace gkd::cuda {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kNowhere = std::numeric_limits<int>::max();
constexpr float kSlackBits = 8;  // how far terms may exceed 1 before the reference follows the maximum

// The sums of one pack, one thread or one row; see StatisticsColumn. `moment` and `gap` are in logits until they are
// written: a difference of two products with the scale would become a fused multiply-add, and so not be exactly 0 where
// both models have the same logits.
struct ModelSums {
  float sum = 0, moment = 0, gap = 0, untempered = 0;

  __device__ __forceinline__ void operator+=(const ModelSums& other) {
    sum += other.sum;
    moment += other.moment;
    gap += other.gap;
    untempered += other.untempered;
  }
};

// One model's sums over the columns that one thread has read. Sums are relative to `reference`, which is a logit not
// far below the maximum, or 0 as long as there is none: as it moves rarely, moving it costs next to nothing.
struct RunningModel {
  float maximum = -kInfinity;
  int top = kNowhere;  // where the pack starts that holds the maximum, the first such
  float reference = 0;
  float bound = -kInfinity;  // a logit above this moves the reference
  ModelSums sums;

  __device__ __forceinline__ void update_maximum(float candidate, int first) {
    top = candidate > maximum ? first : top;
    maximum = fmaxf(candidate, maximum);
  }

  // Returns how far the reference fell, in logits.
  __device__ __forceinline__ float move_reference(float to) {
    const float shift = reference - to;
    reference = to;
    return shift;
  }

  __device__ __forceinline__ float follow(float candidate, float slack) {
    if (!(candidate > bound)) return 0;
    bound = candidate + slack;
    return move_reference(candidate);
  }

  // After both models' references fell by these shifts.
  __device__ __forceinline__ void rescale(float own_shift, float other_shift, const StatisticsParams& params) {
    if (sums.sum == 0) return;
    const float own = at_least(own_shift, kImpossible), factor = exp2(own * params.scale);
    sums.moment = factor * (sums.moment + own * sums.sum);
    sums.sum *= factor;
    sums.gap =
        factor == 0 ? 0 : factor * sums.gap + (own - other_shift) * sums.sum;  // 0, not NaN, where it was infinite
    sums.untempered *= exp2(own_shift * params.untempered_scale);
  }
};

// The pack without its first word; the last one stays.
__device__ __forceinline__ void drop_word(Pack& pack) {
  pack = {{pack.word[1], pack.word[2], pack.word[3], pack.word[3]}};
}

struct PairSums {
  ModelSums student, teacher;
};

// Which columns the kernel computes. Without a teacher its sums stay 0, and the output has the columns of
// StudentStatisticsColumn.
template <bool moments, bool untempered, bool teacher>
struct Columns {
  static constexpr bool kMoments = moments;
  static constexpr bool kUntempered = untempered;
  static constexpr bool kTeacher = teacher;
  static constexpr int kModels = teacher ? 2 : 1;
  static constexpr int kCount =
      teacher ? (moments ? kMomentColumns : kLogSumColumns) + (untempered ? 1 : 0) : int(kAloneColumns);
};

// Sums of a pack. An excluded entry must add nothing, but 0 * -inf is NaN: only `kGuarded` avoids that. It is rarely
// run, so its loop is not unrolled, which saves registers.
template <FloatType type, class Columns, bool kGuarded>
__device__ __forceinline__ PairSums add_up(Pack student_pack, Pack teacher_pack, float student_reference,
                                           float teacher_reference, const StatisticsParams& params) {
  constexpr int kPerWord = Storage<type>::kPerWord;
  PairSums sums;
#pragma unroll(kGuarded ? 1 : kWords)
  for (int i = 0; i < kWords; ++i) {
    float s[kPerWord], t[kPerWord];
    Storage<type>::widen(student_pack.word[kGuarded ? 0 : i], s);
    Storage<type>::widen(teacher_pack.word[kGuarded ? 0 : i], t);
#pragma unroll
    for (int k = 0; k < kPerWord; ++k) {
      const float student = s[k] - student_reference;
      const float student_e = exp2(student * params.scale);
      const bool in_student = !kGuarded || student_e != 0;
      sums.student.sum += student_e;
      if constexpr (Columns::kMoments) sums.student.moment += student_e * (in_student ? student : 0.0f);
      if constexpr (Columns::kTeacher) {
        const float teacher = t[k] - teacher_reference;
        const float teacher_e = exp2(teacher * params.scale);
        sums.teacher.sum += teacher_e;
        if constexpr (Columns::kMoments) {
          const float difference = student - teacher;
          const bool in_teacher = !kGuarded || teacher_e != 0;
          sums.student.gap += student_e * (in_student ? difference : 0.0f);
          sums.teacher.moment += teacher_e * (in_teacher ? teacher : 0.0f);
          sums.teacher.gap -= teacher_e * (in_teacher ? difference : 0.0f);
        }
      }
      if constexpr (Columns::kUntempered) sums.student.untempered += exp2(student * params.untempered_scale);
    }
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
    const float student_shift = student.follow(student_most, slack);
    const float teacher_shift = teacher.follow(teacher_most, slack);
    student.rescale(student_shift, teacher_shift, params);
    teacher.rescale(teacher_shift, student_shift, params);
  }
  PairSums sums = add_up<type, Columns, false>(packs[0], teacher_pack, student.reference, teacher.reference, params);
  if (Columns::kMoments && is_nan(sums.student.moment + sums.student.gap + sums.teacher.moment + sums.teacher.gap)) {
    sums = add_up<type, Columns, true>(packs[0], teacher_pack, student.reference, teacher.reference, params);
  }
  student.sums += sums.student;
  teacher.sums += sums.teacher;
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

template <FloatType type, class Columns>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    statistics_kernel(const __grid_constant__ StatisticsParams params, bool alike) {
  constexpr bool kMoments = Columns::kMoments, kUntempered = Columns::kUntempered, kTeacher = Columns::kTeacher;
  const int64_t i = blockIdx.x;
  float* out = params.out + i * Columns::kCount;
  if (kTeacher && params.mask != nullptr && params.mask[i] == 0) {
    write_skipped(params, Columns::kCount, out);
    return;
  }
  const auto* student_logits = student_row<type>(params.logits, i);
  [[maybe_unused]] const auto* teacher_logits = kTeacher ? teacher_row<type>(params.logits, i) : nullptr;
  const float slack = divide(kSlackBits, fmaxf(params.scale, params.untempered_scale));
  RunningModel student, teacher;
  const Walk<type> walk(student_logits, params.logits.columns, alike);
  const auto body = [&](int first, const Pack(&packs)[Columns::kModels]) {
    take_pack<type, Columns>(student, teacher, packs, first, slack, params);
  };
  if constexpr (kTeacher) {
    walk.for_each({student_logits, teacher_logits}, body);
  } else {
    walk.for_each({student_logits}, body);
  }

  float maxima[2] = {student.maximum, teacher.maximum};
  block_reduce(maxima, Larger());
  const float student_shift = student.move_reference(maxima[0] == -kInfinity ? 0 : maxima[0]);
  const float teacher_shift = teacher.move_reference(maxima[1] == -kInfinity ? 0 : maxima[1]);
  student.rescale(student_shift, teacher_shift, params);
  teacher.rescale(teacher_shift, student_shift, params);

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
  block_reduce(totals, Add());

  if constexpr (!kTeacher) {
    if (threadIdx.x != 0) return;
    out[kAloneMaximum] = maxima[0];
    out[kAloneSum] = totals[0];
    out[kAloneMoment] = params.scale * totals[2];
    out[kAloneUntempered] = totals[kSums - 1];
  } else {
    int tops[2] = {kNowhere, kNowhere};
    if constexpr (kMoments) {
      if (student.top != kNowhere && student.maximum == maxima[0]) {
        tops[0] = find(walk, student_logits, student.top, student.maximum);
      }
      if (teacher.top != kNowhere && teacher.maximum == maxima[1]) {
        tops[1] = find(walk, teacher_logits, teacher.top, teacher.maximum);
      }
      block_reduce(tops, Smaller());
    }

    if (threadIdx.x != 0) return;
    out[kStudentMaximum] = maxima[0];
    out[kStudentSum] = totals[0];
    out[kTeacherMaximum] = maxima[1];
    out[kTeacherSum] = totals[1];
    if constexpr (kMoments) {
      out[kStudentMoment] = params.scale * totals[2];
      out[kStudentGap] = params.scale * totals[3];
      out[kStudentTop] = float(params.first + (tops[0] == kNowhere ? 0 : tops[0]));
      out[kTeacherMoment] = params.scale * totals[4];
      out[kTeacherGap] = params.scale * totals[5];
      out[kTeacherTop] = float(params.first + (tops[1] == kNowhere ? 0 : tops[1]));
    }
    if constexpr (kUntempered) out[Columns::kCount - 1] = totals[kSums - 1];
  }
}

}  // namespace

void statistics(const StatisticsParams& params, void* stream) {
  const int64_t rows = params.logits.rows;
  const bool alike = lie_alike(params.logits);
  GKD_TYPE_SWITCH(params.logits.type, [&] {
    if (!params.logits.has_teacher) {
      return launch(statistics_kernel<kType, Columns<true, true, false>>, rows, stream, params, alike);
    }
    GKD_BOOL_SWITCH(params.moments, kMoments, [&] {
      GKD_BOOL_SWITCH(params.untempered_scale != 0, kUntempered, [&] {
        launch(statistics_kernel<kType, Columns<kMoments, kUntempered, true>>, rows, stream, params, alike);
      });
    });
  });
}

}  // namespace gkd::cuda
