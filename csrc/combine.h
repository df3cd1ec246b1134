// From the statistics and sums of all ranks to what the gradient of a token needs, and to its metrics: for the kernels of
// CPU and GPU. These are a few numbers per token, so all arithmetic is in fp64. Every rank adds the same numbers in the
// order of the ranks, and so has the same bits.

#pragma once

#include <cmath>
#include <limits>

#include "params.h"
#include "vector_math.h"

namespace gkd {

constexpr int64_t kIgnoredLabel = -100;

// The columns of the metrics of a token, in the order of `PerToken` in megatron_gkd/ops/params.py.
enum MetricColumn {
  kDivergence,
  kCrossEntropy,
  kTeacherEntropy,
  kStudentEntropy,
  kForwardKl,
  kReverseKl,
  kTop1Agreement,
  kMetricColumns,
};

// Where the divergence comes from: from the sums of the second pass, or from the moments of the first one.
enum class DivergenceSource { sums, forward_kl, reverse_kl };

struct LabelLogitParams {
  const void* student;  // [rows, columns], the true columns of this shard
  int64_t stride;
  int64_t rows;
  int64_t columns;
  FloatType type;
  int64_t first;         // global id of the first column
  const int64_t* label;  // [rows], global ids
  float* out;            // [rows]: the label's logit; -inf where another rank has the label, or none
};

struct CombineParams {
  // From each rank, `rank_stride` numbers: statistics [rows, columns], and with labels their logits [rows].
  const float* gathered;
  int64_t ranks;
  int64_t rank_stride;
  int64_t rows;
  int columns;
  bool has_teacher;
  bool moments;
  float scale;           // log2(e) / temperature
  const uint8_t* mask;   // [rows] or null; the metrics of rows of 0 are 0
  const int64_t* label;  // [rows], global ids; null without a cross-entropy
  int64_t first, valid;  // this shard's first global id, and how many ids it has
  DivergenceSource source;
  const float* token_weight;  // [rows], of the divergence in the loss; null without a loss
  const float* label_weight;  // [rows], of the cross-entropy in the loss; null where it is a metric only
  float factor;               // of all gradients
  // Outputs; null where they are not wanted.
  RowNormalizers* normalizers;  // [rows]
  float* metrics;               // rows of kMetricColumns
  float* loss;                  // [rows]: what the token adds to the loss; without the divergence where that is in sums
  float* slope_sum;             // [rows]; only where the divergence is not in sums
  float* weight;                // [rows], factor * token_weight
  float* untempered;            // [2, rows]: shift and bias of the student at temperature 1
  float* scaled_label_weight;   // [rows], factor * label_weight, 0 where the label is ignored
  int64_t* label_column;        // [rows]: this shard's column of the label, or -1
};

struct CombineSumsParams {
  const float* gathered;  // [ranks, rows, 2], of `sums`
  int64_t ranks;
  int64_t rows;
  const float* token_weight;  // as above
  float* metrics;             // of each row the divergence is written
  float* loss;                // [rows], to which the divergence is added
  float* slope_sum;           // [rows]
};

namespace detail {

GKD_INLINE float from_half(uint16_t half) {
  const int32_t bits = (half & 0x7FFF) << 13;
  const bool is_special = (half & 0x7C00) == 0x7C00;  // infinite or NaN
  const float magnitude = is_special ? Lanes<float>::from_bits(bits | 0x7F800000)
                                     : Lanes<float>::from_bits(bits) * 5.192296858534828e33f;  // 2^112
  return half & 0x8000 ? -magnitude : magnitude;
}

// One number of a row of logits.
GKD_INLINE float logit_at(const void* logits, int64_t i, FloatType type) {
  if (type == FloatType::f32) return static_cast<const float*>(logits)[i];
  const uint16_t half = static_cast<const uint16_t*>(logits)[i];
  if (type == FloatType::bf16) return Lanes<float>::from_bits(static_cast<int32_t>(static_cast<uint32_t>(half) << 16));
  return float(from_half(half));
}

// Rounded to bfloat16, to nearest, ties to even.
GKD_INLINE float round_to_bf16(float x) {
  if (x != x) return x;
  const auto bits = static_cast<uint32_t>(Lanes<float>::bits(x));
  return Lanes<float>::from_bits(static_cast<int32_t>((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000u));
}

// 0 where the weight is 0, even if x is infinite.
GKD_INLINE double weighted(double weight, double x) { return weight == 0 ? 0 : weight * x; }

// max(x, 0); NaN stays NaN.
GKD_INLINE double not_negative(double x) { return x < 0 ? 0 : x; }

// The numbers of one token, of all ranks.
struct Ranks {
  const float* row;
  int64_t stride;
  int64_t count;

  GKD_INLINE double at(int64_t rank, int column) const { return row[rank * stride + column]; }
};

// One model's sums over the vocabulary, relative to its maximum over all ranks.
struct CombinedModel {
  Ranks ranks;
  int maximum_column, sum_column;
  double scale, maximum, total, log_sum;

  GKD_INLINE CombinedModel(const Ranks& ranks, int maximum_column, int sum_column, double scale)
      : ranks(ranks), maximum_column(maximum_column), sum_column(sum_column), scale(scale) {
    maximum = ranks.at(0, maximum_column);
    for (int64_t r = 1; r < ranks.count; ++r) {
      const double other = ranks.at(r, maximum_column);
      maximum = other > maximum ? other : maximum;
    }
    total = 0;
    for (int64_t r = 0; r < ranks.count; ++r) total += shrink(r) * ranks.at(r, sum_column);
    log_sum = ::log2(total);
  }

  // By how many bits the rank's reference is below the maximum, <= 0.
  GKD_INLINE double offset(int64_t r) const {
    const double of_rank = ranks.at(r, maximum_column);
    return ((of_rank == -std::numeric_limits<double>::infinity() ? 0 : of_rank) - maximum) * scale;
  }

  // A shard without a finite logit has no mass, whatever its offset is.
  GKD_INLINE double shrink(int64_t r) const { return ranks.at(r, sum_column) == 0 ? 0 : ::exp2(offset(r)); }

  // The mean of a quantity over the distribution, from the ranks' sums, in which it is too small by `missing(rank)`.
  template <class Missing>
  GKD_INLINE double mean(int column, const Missing& missing) const {
    double sum = 0;
    for (int64_t r = 0; r < ranks.count; ++r) {
      const double factor = shrink(r);
      if (factor != 0) sum += factor * (ranks.at(r, column) + missing(r) * ranks.at(r, sum_column));
    }
    return sum / total;
  }

  // In nats.
  GKD_INLINE double entropy(int moment_column) const {
    return double(kLn2) * (log_sum - mean(moment_column, [&](int64_t r) { return offset(r); }));
  }

  // log2 of a probability is scale (z - shift) - bias.
  GKD_INLINE void normalizer(float& shift, float& bias) const {
    const double exact = maximum + log_sum / scale;
    shift = float(exact);
    bias = round_to_bf16(float((exact - double(shift)) * scale));
  }

  // The lowest id of the maximum over all ranks.
  GKD_INLINE double top(int id_column) const {
    double lowest = std::numeric_limits<double>::infinity();
    for (int64_t r = 0; r < ranks.count; ++r) {
      const double id = ranks.at(r, id_column);
      if (ranks.at(r, maximum_column) == maximum && id < lowest) lowest = id;
    }
    return lowest;
  }
};

}  // namespace detail

GKD_INLINE void label_logit_row(const LabelLogitParams& params, int64_t i) {
  const int64_t column = params.label[i] - params.first;
  const bool here = column >= 0 && column < params.columns;
  params.out[i] = here ? detail::logit_at(params.student, i * params.stride + column, params.type)
                       : -std::numeric_limits<float>::infinity();
}

// What the token adds to the loss by its cross-entropy, which is written among the metrics.
GKD_INLINE double combine_labels(const CombineParams& params, const detail::Ranks& ranks, int64_t i, float* metrics) {
  const int untempered_column = params.has_teacher ? params.columns - 1 : int(kAloneUntempered);
  const detail::CombinedModel model(ranks, kStudentMaximum, untempered_column, kLog2E);
  float logit = -std::numeric_limits<float>::infinity();
  for (int64_t r = 0; r < params.ranks; ++r) {
    const float of_rank = params.gathered[r * params.rank_stride + params.rows * params.columns + i];
    logit = of_rank > logit ? of_rank : logit;
  }
  const int64_t label = params.label[i], column = label - params.first;
  const bool is_ignored = label == kIgnoredLabel;
  const double log_prob = (double(logit) - model.maximum) * model.scale - model.log_sum;
  metrics[kCrossEntropy] = is_ignored ? 0 : float(-double(kLn2) * log_prob);
  if (params.untempered != nullptr) model.normalizer(params.untempered[i], params.untempered[params.rows + i]);
  if (params.label_column != nullptr) params.label_column[i] = column >= 0 && column < params.valid ? column : -1;
  if (params.label_weight == nullptr || is_ignored) {
    if (params.scaled_label_weight != nullptr) params.scaled_label_weight[i] = 0;
    return 0;
  }
  const float weight = params.label_weight[i];
  if (params.scaled_label_weight != nullptr) params.scaled_label_weight[i] = weight * params.factor;
  return detail::weighted(weight, metrics[kCrossEntropy]);
}

// The entropies, KL divergences and agreement of a row of both models, from statistics with moments.
GKD_INLINE void combine_moments(const detail::CombinedModel& student, const detail::CombinedModel& teacher,
                                float* metrics) {
  const auto between = [&](int64_t r) { return student.offset(r) - teacher.offset(r); };
  const double reverse = student.mean(kStudentGap, between) - student.log_sum + teacher.log_sum;
  const double forward =
      teacher.mean(kTeacherGap, [&](int64_t r) { return -between(r); }) - teacher.log_sum + student.log_sum;
  metrics[kTeacherEntropy] = float(teacher.entropy(kTeacherMoment));
  metrics[kStudentEntropy] = float(student.entropy(kStudentMoment));
  metrics[kForwardKl] = float(detail::not_negative(double(kLn2) * forward));
  metrics[kReverseKl] = float(detail::not_negative(double(kLn2) * reverse));
  metrics[kTop1Agreement] = student.top(kStudentTop) == teacher.top(kTeacherTop) ? 1 : 0;
}

GKD_INLINE void combine_statistics_row(const CombineParams& params, int64_t i) {
  const detail::Ranks ranks = {params.gathered + i * params.columns, params.rank_stride, params.ranks};
  float metrics[kMetricColumns] = {};
  double loss = params.label == nullptr ? 0 : combine_labels(params, ranks, i, metrics);
  const detail::CombinedModel student(ranks, kStudentMaximum, kStudentSum, params.scale);
  if (!params.has_teacher) {
    metrics[kStudentEntropy] = float(student.entropy(kAloneMoment));
  } else {
    const detail::CombinedModel teacher(ranks, kTeacherMaximum, kTeacherSum, params.scale);
    if (params.normalizers != nullptr) {
      RowNormalizers& n = params.normalizers[i];
      student.normalizer(n.student_shift, n.student_bias);
      teacher.normalizer(n.teacher_shift, n.teacher_bias);
    }
    const bool is_masked = params.mask != nullptr && params.mask[i] == 0;
    if (params.moments && !is_masked) combine_moments(student, teacher, metrics);
  }
  const float weight = params.token_weight == nullptr ? 0 : params.token_weight[i];
  if (params.weight != nullptr) params.weight[i] = weight * params.factor;
  if (params.has_teacher && params.source != DivergenceSource::sums) {
    const bool is_forward = params.source == DivergenceSource::forward_kl;
    metrics[kDivergence] = metrics[is_forward ? kForwardKl : kReverseKl];
    loss += detail::weighted(weight, metrics[kDivergence]);
    // The slopes p - q of the forward KL divergence add up to 0.
    if (params.slope_sum != nullptr) params.slope_sum[i] = is_forward ? 0 : metrics[kDivergence];
  }
  if (params.loss != nullptr) params.loss[i] = float(loss);
  if (params.metrics != nullptr) {
    for (int k = 0; k < kMetricColumns; ++k) params.metrics[i * kMetricColumns + k] = metrics[k];
  }
}

GKD_INLINE void combine_sums_row(const CombineSumsParams& params, int64_t i) {
  double value = 0, slope = 0;
  for (int64_t r = 0; r < params.ranks; ++r) {
    const float* of_rank = params.gathered + 2 * (r * params.rows + i);
    value += of_rank[0];
    slope += of_rank[1];
  }
  if (value < 0) value = 0;  // by rounding; NaN stays NaN
  params.slope_sum[i] = float(slope);
  if (params.metrics != nullptr) params.metrics[i * kMetricColumns + kDivergence] = float(value);
  if (params.loss == nullptr) return;
  const float weight = params.token_weight[i];
  params.loss[i] = float(params.loss[i] + detail::weighted(weight, float(value)));
}

}  // namespace gkd
