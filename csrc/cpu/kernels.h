// The passes for a CPU, over rows [begin, end). Compiled once per instruction set: see kernels_*.cpp.

#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "../divergences.h"
#include "../gradient_row.h"
#include "../params.h"
#include "../switches.h"
#include "vector.h"

namespace gkd::GKD_CPU_NAMESPACE {

constexpr int64_t kBlock = 2048;  // columns that stay in the first-level cache between two loops, of both models
constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <FloatType type>
struct RowPointers {
  using Element = typename Storage<type>::Element;
  const Element* student;
  const Element* teacher;

  RowPointers(const Logits& logits, int64_t row)
      : student(static_cast<const Element*>(logits.student) + row * logits.student_stride),
        teacher(static_cast<const Element*>(logits.teacher) + row * logits.teacher_stride) {}
};

// One model's running sums, relative to `reference`: its maximum so far, or 0 as long as there is none.
struct RunningSoftmax {
  float maximum = -kInfinity;
  float reference = 0;
  int64_t top = 0;
  double sum = 0, moment = 0, gap = 0, untempered = 0;

  // Takes a new maximum into account. Returns how far the reference fell, in logits: <= 0 after the first one.
  double raise(float candidate) {
    if (!(candidate > maximum)) return 0;
    const double shift = (double(reference) - candidate);
    maximum = reference = candidate;
    return shift;
  }

  void rescale(double own_shift, double other_shift, const StatisticsParams& params) {
    if (own_shift != 0 && sum != 0) {
      const double own = own_shift * params.scale, factor = std::exp2(own);
      gap += own * sum;
      moment = factor * (moment + own * sum);
      gap *= factor;
      sum *= factor;
      untempered *= std::exp2(own_shift * params.untempered_scale);
    }
    if (other_shift != 0) gap -= other_shift * params.scale * sum;
  }
};

// The first of columns [begin, end) that holds `value`.
template <FloatType type>
int64_t find(const typename Storage<type>::Element* row, int64_t begin, int64_t end, float value) {
  int64_t found = end;
  for_each_vector(begin, end, [&](int64_t j, auto count) {
    if (found != end) return;
    const Floats x = load_count<type>(row + j, count);
    for (int i = 0; i < kLanes; ++i) {
      if (x[i] == value) {
        found = j + i;
        return;
      }
    }
  });
  return found;
}

// Without a teacher its sums stay 0, and `out` has the columns of StudentStatisticsColumn.
template <FloatType type, bool kMoments, bool kTeacher>
void statistics_row(const StatisticsParams& params, const RowPointers<type>& row, float* out) {
  const bool untempered = params.untempered_scale != 0;
  const bool other_scale = untempered && params.untempered_scale != params.scale;  // else the sums are the same
  RunningSoftmax student, teacher;
  for (int64_t begin = 0; begin < params.logits.columns; begin += kBlock) {
    const int64_t end = begin + kBlock < params.logits.columns ? begin + kBlock : params.logits.columns;
    Floats student_most = splat<Floats>(-kInfinity), teacher_most = student_most;
    for_each_vector(begin, end, [&](int64_t j, auto count) {
      const Floats s = load_count<type>(row.student + j, count);
      student_most = s > student_most ? s : student_most;
      if constexpr (kTeacher) {
        const Floats t = load_count<type>(row.teacher + j, count);
        teacher_most = t > teacher_most ? t : teacher_most;
      }
    });

    const double student_shift = student.raise(maximum(student_most));
    const double teacher_shift = kTeacher ? teacher.raise(maximum(teacher_most)) : 0;
    if constexpr (kMoments && kTeacher) {
      if (student_shift != 0) student.top = find<type>(row.student, begin, end, student.maximum);
      if (teacher_shift != 0) teacher.top = find<type>(row.teacher, begin, end, teacher.maximum);
    }
    student.rescale(student_shift, teacher_shift, params);
    teacher.rescale(teacher_shift, student_shift, params);

    const float student_reference = student.reference, teacher_reference = teacher.reference;
    Floats sums[7] = {};
    for_each_vector(begin, end, [&](int64_t j, auto count) {
      const Floats s = load_count<type>(row.student + j, count) - student_reference;
      const Floats student_bits = s * params.scale;
      const Floats student_e = exp2(student_bits);
      const auto in_student = student_e != 0.0f;  // 0 * -inf must be 0: an excluded entry adds nothing
      sums[0] += student_e;
      if constexpr (kMoments) sums[2] += student_e * (in_student ? student_bits : Floats{});
      if constexpr (kTeacher) {
        const Floats t = load_count<type>(row.teacher + j, count) - teacher_reference;
        const Floats teacher_bits = t * params.scale;
        const Floats teacher_e = exp2(teacher_bits);
        sums[1] += teacher_e;
        if constexpr (kMoments) {
          const auto in_teacher = teacher_e != 0.0f;
          const Floats difference = student_bits - teacher_bits;
          sums[3] += student_e * (in_student ? difference : Floats{});
          sums[4] += teacher_e * (in_teacher ? teacher_bits : Floats{});
          sums[5] -= teacher_e * (in_teacher ? difference : Floats{});
        }
      }
      if (other_scale) sums[6] += exp2(s * params.untempered_scale);
    });
    student.sum += sum(sums[0]);
    teacher.sum += sum(sums[1]);
    student.moment += sum(sums[2]);
    student.gap += sum(sums[3]);
    teacher.moment += sum(sums[4]);
    teacher.gap += sum(sums[5]);
    student.untempered += sum(sums[6]);
  }
  if (!other_scale) student.untempered = student.sum;

  if constexpr (!kTeacher) {
    out[kAloneMaximum] = student.maximum;
    out[kAloneSum] = float(student.sum);
    out[kAloneMoment] = float(student.moment);
    out[kAloneUntempered] = float(student.untempered);
    return;
  }
  out[kStudentMaximum] = student.maximum;
  out[kStudentSum] = float(student.sum);
  out[kTeacherMaximum] = teacher.maximum;
  out[kTeacherSum] = float(teacher.sum);
  if constexpr (kMoments) {
    out[kStudentMoment] = float(student.moment);
    out[kStudentGap] = float(student.gap);
    out[kStudentTop] = float(params.first + student.top);
    out[kTeacherMoment] = float(teacher.moment);
    out[kTeacherGap] = float(teacher.gap);
    out[kTeacherTop] = float(params.first + teacher.top);
  }
  if (untempered) out[statistics_columns(kMoments, true) - 1] = float(student.untempered);
}

inline void skipped_statistics(int columns, bool untempered, float* out) {
  for (int i = 0; i < columns; ++i) out[i] = 0;
  out[kStudentSum] = out[kTeacherSum] = 1;
  if (untempered) out[columns - 1] = 1;
}

template <FloatType type, bool kMoments>
void statistics_rows(const StatisticsParams& params, int64_t begin, int64_t end) {
  const bool untempered = params.untempered_scale != 0;
  const int columns = statistics_columns(kMoments, untempered);
  for (int64_t i = begin; i < end; ++i) {
    float* out = params.out + i * columns;
    if (params.mask != nullptr && params.mask[i] == 0) {
      skipped_statistics(columns, untempered, out);
    } else {
      statistics_row<type, kMoments, true>(params, RowPointers<type>(params.logits, i), out);
    }
  }
}

template <FloatType type>
void student_statistics_rows(const StatisticsParams& params, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    statistics_row<type, true, false>(params, RowPointers<type>(params.logits, i), params.out + i * kAloneColumns);
  }
}

template <FloatType type, class Form>
void sums_rows(const SumsParams& params, const Weights& weights, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    float* out = params.out + 2 * i;
    out[0] = out[1] = 0;
    if (params.mask != nullptr && params.mask[i] == 0) continue;
    const RowPointers<type> row(params.logits, i);
    const Form form(weights, Normalization{params.scale, params.normalizers[i]});
    double value = 0, slope = 0;
    for (int64_t from = 0; from < params.logits.columns; from += kBlock) {
      const int64_t to = from + kBlock < params.logits.columns ? from + kBlock : params.logits.columns;
      Floats values = {}, slopes = {};
      for_each_vector(from, to, [&](int64_t j, auto count) {
        const Floats s = load_count<type>(row.student + j, count), t = load_count<type>(row.teacher + j, count);
        form.template add<false>(s, t, values, slopes);
      });
      value += sum(values);
      slope += sum(slopes);
    }
    const RowSums sums(form, value, slope);
    out[0] = sums.value;
    out[1] = sums.slope;
  }
}

template <FloatType type, bool kCapped, bool kDivergence, bool kCrossEntropy, class Form>
void gradient_row(const GradientParams& params, const GradientRow<Form>& at, int64_t i) {
  using Element = typename Storage<type>::Element;
  const RowPointers<type> row(params.logits, i);
  Element* out = static_cast<Element*>(params.out) + i * params.out_stride;
  const auto gradient = [&](Floats s, Floats t) {
    Floats g = {};
    if constexpr (kDivergence) g = at.template of_divergence<false>(s, t);
    if constexpr (kCrossEntropy) g += at.of_cross_entropy(s);
    return g;
  };
  const int64_t label = at.label_factor != 0 ? params.label[i] : -1;
  Floats at_label = {};  // computed before the loop, which may overwrite the logits
  if (label >= 0) {
    const Floats s = load_some<type>(row.student + label, 1);
    Floats t = {};
    if constexpr (kDivergence) t = load_some<type>(row.teacher + label, 1);
    at_label = at.template before_softcap<kCapped>(gradient(s, t) - at.label_factor, s);
  }
  for_each_vector(0, params.logits.columns, [&](int64_t j, auto count) {
    const Floats s = load_count<type>(row.student + j, count);
    Floats t = {};
    if constexpr (kDivergence) t = load_count<type>(row.teacher + j, count);
    const Floats g = at.template before_softcap<kCapped>(gradient(s, t), s);
    if constexpr (std::is_same_v<decltype(count), int64_t>) {
      store_some<type>(out + j, g, count);
    } else {
      store<type>(out + j, g);
    }
  });
  if (label >= 0) store_some<type>(out + label, at_label, 1);
}

template <FloatType type, bool kCapped, class Form>
void gradient_rows(const GradientParams& params, const Weights& weights, int64_t begin, int64_t end) {
  using Element = typename Storage<type>::Element;
  for (int64_t i = begin; i < end; ++i) {
    const GradientRow<Form> at(params, weights, i, params.label_weight != nullptr);
    Element* out = static_cast<Element*>(params.out) + i * params.out_stride;
    const bool with_divergence = params.weight != nullptr && params.weight[i] != 0;
    const bool with_label = at.label_factor != 0;
    if (with_divergence && (!with_label || at.shares_label)) {
      gradient_row<type, kCapped, true, false>(params, at, i);
    } else if (with_divergence) {
      gradient_row<type, kCapped, true, true>(params, at, i);
    } else if (with_label) {
      gradient_row<type, kCapped, false, true>(params, at, i);
    }
    const int64_t first_zero = with_divergence || with_label ? params.logits.columns : 0;
    std::memset(static_cast<void*>(out + first_zero), 0, (params.width - first_zero) * sizeof(Element));
  }
}

template <FloatType type>
void softcap_rows(const SoftcapParams& params, int64_t begin, int64_t end) {
  using Element = typename Storage<type>::Element;
  for (int64_t i = begin; i < end; ++i) {
    const RowPointers<type> row(params.logits, i);
    Element* out = static_cast<Element*>(params.out) + i * params.out_stride;
    for_each_vector(0, params.logits.columns, [&](int64_t j, auto count) {
      const Floats y = gkd::softcap(load_count<type>(row.student + j, count), params.cap);
      if constexpr (std::is_same_v<decltype(count), int64_t>) {
        store_some<type>(out + j, y, count);
      } else {
        store<type>(out + j, y);
      }
    });
  }
}

void statistics(const StatisticsParams& params, int64_t begin, int64_t end) {
  GKD_TYPE_SWITCH(params.logits.type, [&] {
    if (!params.logits.has_teacher) return student_statistics_rows<kType>(params, begin, end);
    GKD_BOOL_SWITCH(params.moments, kMoments, [&] { statistics_rows<kType, kMoments>(params, begin, end); });
  });
}

void sums(const SumsParams& params, int64_t begin, int64_t end) {
  GKD_TYPE_SWITCH(params.logits.type, [&] {
    GKD_FORM_SWITCH(kType, params.kind, params.beta,
                    [&](const Weights& weights) { sums_rows<kType, Form>(params, weights, begin, end); });
  });
}

void gradient(const GradientParams& params, int64_t begin, int64_t end) {
  GKD_TYPE_SWITCH(params.logits.type, [&] {
    GKD_FORM_SWITCH(kType, params.kind, params.beta, [&](const Weights& weights) {
      GKD_BOOL_SWITCH(params.inverse_softcap != 0, kCapped,
                      [&] { gradient_rows<kType, kCapped, Form>(params, weights, begin, end); });
    });
  });
}

void softcap(const SoftcapParams& params, int64_t begin, int64_t end) {
  GKD_TYPE_SWITCH(params.logits.type, [&] { softcap_rows<kType>(params, begin, end); });
}

}  // namespace gkd::GKD_CPU_NAMESPACE
