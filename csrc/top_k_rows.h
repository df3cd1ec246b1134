// What is done with the few numbers of one row, by a team: one thread of a CPU, or a block of a GPU.
//
// A team has a `rank` and a `size`, and `largest(x)` and `total(x)` over its members, which all of them call. T is the
// storage of the logits: T::read(row, column) is a logit in float.

#pragma once

#include <cmath>

#include "softcap.h"
#include "top_k.h"
#include "top_k_terms.h"

namespace gkd {

constexpr double kNone = -__builtin_inf();

GKD_INLINE double finite(double maximum) { return maximum == kNone ? 0.0 : maximum; }
GKD_INLINE double larger(double a, double b) { return b > a ? b : a; }

// ln of the share of a logit in a sum.
GKD_INLINE double log_share(double z, double maximum, double log, double inverse_temperature) {
  return (z - finite(maximum)) * inverse_temperature - log;
}

// ---- merge

// How many of `count` candidates in order come before `order`, and with `equals` those that equal it.
GKD_INLINE int64_t count_before(const int32_t* values, int64_t count, uint32_t order, bool equals) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    const uint32_t other = order_of(Lanes<float>::from_bits(values[middle]));
    if (other > order || (equals && other == order)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Ranks hold rising ids, so among equals a lower rank comes first; within a rank they are in order.
template <class Team>
GKD_INLINE void merge_row(const TopKMergeParams& params, int64_t row, const Team& team) {
  const bool with_tail = params.tail != nullptr;
  const int64_t words = candidate_words(params.places, with_tail), places = params.places;
  const auto candidates = [&](int64_t rank) { return params.gathered + (rank * params.rows + row) * words; };
  const auto logit = [&](int64_t rank, int64_t word) { return Lanes<float>::from_bits(candidates(rank)[word]); };
  uint32_t highest = 0;
  for (int64_t rank = 0; rank < params.ranks; ++rank) {
    const uint32_t order = order_of(logit(rank, 0));
    highest = order > highest ? order : highest;
  }
  const float shift = float(finite(logit_of(highest)));
  const auto position = [&](int64_t rank, int64_t i) {
    const uint32_t order = order_of(logit(rank, i));
    int64_t before = i;
    for (int64_t other = 0; other < params.ranks; ++other) {
      if (other != rank) before += count_before(candidates(other), places, order, other < rank);
    }
    return before;
  };
  double most = kNone;
  for (int64_t c = team.rank; c < params.ranks * places; c += team.size) {
    const int64_t rank = c / places, i = c % places, at = position(rank, i);
    if (at < params.k) {
      params.ids[row * params.k + at] = candidates(rank)[words - places + i];
      params.values[row * params.k + at] = logit(rank, i) - shift;
    } else {
      most = larger(most, logit(rank, i));
    }
  }
  if (!with_tail) return;
  for (int64_t rank = 0; rank < params.ranks; ++rank) most = larger(most, logit(rank, places));
  most = team.largest(most);
  double sum = 0;
  const auto add = [&](double count, float z) {
    sum += detail::weighted(count, exp((z - finite(most)) * params.inverse_temperature));
  };
  for (int64_t c = team.rank; c < params.ranks * places; c += team.size) {
    const int64_t rank = c / places, i = c % places;
    if (position(rank, i) >= params.k) add(1, logit(rank, i));
  }
  for (int64_t rank = team.rank; rank < params.ranks; rank += team.size)
    add(logit(rank, places + 1), logit(rank, places));
  sum = team.total(sum);
  if (team.rank == 0) params.tail[row] = float(log(sum) + (most - shift) * params.inverse_temperature);
}

// ---- statistics of the k tokens

// This shard's columns among the ids of a row: the column of the i-th id, or -1.
GKD_INLINE int64_t own_column(const TopKTokens& tokens, int64_t columns, int64_t row, int64_t i) {
  const int64_t column = tokens.ids[row * tokens.k + i] - tokens.first;
  return column >= 0 && column < columns ? column : -1;
}

// One part's sums of exponentials, relative to the maximum.
struct PartSums {
  double maximum, sum, untempered;
};

template <class T, class Team>
GKD_INLINE PartSums sum_tokens(const TopKStatisticsParams& params, int64_t row, const typename T::Element* logits,
                               const Team& team) {
  double most = kNone;
  for (int64_t i = team.rank; i < params.tokens.k; i += team.size) {
    const int64_t column = own_column(params.tokens, params.logits.columns, row, i);
    if (column >= 0) most = larger(most, T::read(logits, column));
  }
  most = team.largest(most);
  const bool with_labels = params.columns == kLabelColumns;
  double sum = 0, untempered = 0;
  for (int64_t i = team.rank; i < params.tokens.k; i += team.size) {
    const int64_t column = own_column(params.tokens, params.logits.columns, row, i);
    if (column < 0) continue;
    const double z = T::read(logits, column) - finite(most);
    sum += exp(z * params.inverse_temperature);
    if (with_labels) untempered += exp(z);
  }
  return {most, team.total(sum), with_labels ? team.total(untempered) : 0.0};
}

template <class T>
GKD_INLINE void write_statistics(const TopKStatisticsParams& params, int64_t row, const typename T::Element* logits,
                                 const PartSums& top, const PartSums& others) {
  float* out = params.out + row * params.columns;
  out[kTopMaximum] = float(top.maximum);
  out[kTopSum] = float(top.sum);
  if (params.columns == kTopColumns) return;
  out[kOthersMaximum] = float(others.maximum);
  out[kOthersSum] = float(others.sum);
  if (params.columns == kPartsColumns) return;
  const double most = finite(larger(top.maximum, others.maximum));
  out[kUntemperedSum] =
      float(top.untempered * exp(finite(top.maximum) - most) + others.untempered * exp(finite(others.maximum) - most));
  const int64_t label = params.labels[row] - params.tokens.first;
  const bool here = label >= 0 && label < params.logits.columns;
  out[kLabelLogit] = here ? T::read(logits, label) : float(kNone);
}

// ---- normalizers and sums over the outcomes

struct ExactLogSum {
  double maximum, log;  // the maximum may be -inf

  GKD_INLINE double log_share(double z, double inverse_temperature) const {
    return gkd::log_share(z, maximum, log, inverse_temperature);
  }
  GKD_INLINE LogSum rounded() const { return {float(maximum), float(log)}; }
};

// Of all ranks' parts whose maximum and sum are in these columns; `parts` pairs of columns, or one sum relative to the
// larger maximum of two parts. The largest logit adds 1, so a total below 1 is nothing.
GKD_INLINE ExactLogSum combine_parts(const TopKSumsParams& params, int64_t row, int first, int parts) {
  const auto at = [&](int64_t rank, int column) {
    return params.gathered[(rank * params.logits.rows + row) * params.columns + column];
  };
  double most = kNone, total = 0;
  for (int64_t rank = 0; rank < params.ranks; ++rank) {
    for (int part = 0; part < parts; ++part) most = larger(most, at(rank, first + 2 * part));
  }
  for (int64_t rank = 0; rank < params.ranks; ++rank) {
    for (int part = 0; part < parts; ++part) {
      const double sum = at(rank, first + 2 * part + 1);
      total += detail::weighted(sum, exp((at(rank, first + 2 * part) - finite(most)) * params.inverse_temperature));
    }
  }
  return {most, log(total < 1 ? 1.0 : total)};
}

GKD_INLINE ExactLogSum combine_untempered(const TopKSumsParams& params, int64_t row) {
  const auto at = [&](int64_t rank, int column) {
    return params.gathered[(rank * params.logits.rows + row) * params.columns + column];
  };
  double most = kNone, total = 0;
  for (int64_t rank = 0; rank < params.ranks; ++rank) {
    most = larger(most, larger(at(rank, kTopMaximum), at(rank, kOthersMaximum)));
  }
  for (int64_t rank = 0; rank < params.ranks; ++rank) {
    const double own = larger(at(rank, kTopMaximum), at(rank, kOthersMaximum));
    total += detail::weighted(at(rank, kUntemperedSum), exp(own - finite(most)));
  }
  return {most, log(total < 1 ? 1.0 : total)};
}

GKD_INLINE float cross_entropy(const TopKSumsParams& params, int64_t row, const ExactLogSum& untempered) {
  if (params.labels[row] == kIgnoredLabel) return 0;
  double label = kNone;
  for (int64_t rank = 0; rank < params.ranks; ++rank) {
    label = larger(label, params.gathered[(rank * params.logits.rows + row) * params.columns + kLabelLogit]);
  }
  return float(-untempered.log_share(label, 1));
}

GKD_INLINE bool is_present(const TopKTokens& tokens, int64_t row, int64_t i) {
  const int64_t id = tokens.ids[row * tokens.k + i];
  return id >= 0 && id < tokens.vocabulary;
}

// The teacher's logit of the i-th token over the temperature; -inf where it is missing.
GKD_INLINE double teacher_bits(const TopKTokens& tokens, int64_t row, int64_t i, double inverse_temperature) {
  return is_present(tokens, row, i) ? tokens.values[row * tokens.k + i] * inverse_temperature : kNone;
}

// Over the teacher's outcomes, in units of the temperature; and its largest token, and whether a token is left over.
struct TeacherRow {
  double maximum, log, best, tail;
};

template <class Team>
GKD_INLINE TeacherRow teacher_row(const TopKTokens& tokens, int64_t row, double inverse_temperature, const Team& team) {
  double best = kNone, present = 0;
  for (int64_t i = team.rank; i < tokens.k; i += team.size) {
    best = larger(best, teacher_bits(tokens, row, i, inverse_temperature));
    present += is_present(tokens, row, i);
  }
  best = team.largest(best);
  present = team.total(present);
  // Where no token is left for the bucket, the tail holds rounding errors only.
  const bool with_tail = tokens.tail != nullptr && present != double(tokens.vocabulary);
  const double tail = with_tail ? tokens.tail[row] : kNone, most = finite(larger(best, tail));
  double sum = 0;
  for (int64_t i = team.rank; i < tokens.k; i += team.size) {
    sum += exp(teacher_bits(tokens, row, i, inverse_temperature) - most);
  }
  sum = team.total(sum) + exp(tail - most);
  return {most, log(sum < 1 ? 1.0 : sum), best, tail};
}

struct OutcomeSums {
  double of[kTopKSums] = {};

  GKD_INLINE void add(const Outcome& outcome, const TopKSumsParams& params) {
    const OutcomeTerms terms = outcome.terms(params.kind, params.beta);
    of[kTopKValue] += terms.value;
    of[kTopKSlope] += terms.slope;
    of[kTopKStudentEntropy] -= detail::weighted(outcome.p, outcome.a);
    of[kTopKTeacherEntropy] -= detail::weighted(outcome.q, outcome.b);
    of[kTopKForwardKl] += outcome.forward_kl().value;
    of[kTopKReverseKl] += outcome.reverse_kl().value;
  }
};

template <class T, class Team>
GKD_INLINE void sums_row(const TopKSumsParams& params, int64_t row, const typename T::Element* logits,
                         const Team& team) {
  const TopKTokens& tokens = params.tokens;
  const bool bucket = tokens.tail != nullptr;
  const double inverse_temperature = params.inverse_temperature;
  const ExactLogSum student = combine_parts(params, row, kTopMaximum, bucket ? 2 : 1);
  const ExactLogSum others = bucket ? combine_parts(params, row, kOthersMaximum, 1) : ExactLogSum{0, 0};
  const TeacherRow teacher = teacher_row(tokens, row, inverse_temperature, team);
  OutcomeSums sums;
  double agrees = 0;
  for (int64_t i = team.rank; i < tokens.k; i += team.size) {
    const int64_t column = own_column(tokens, params.logits.columns, row, i);
    if (column < 0) continue;
    const double z = T::read(logits, column), bits = teacher_bits(tokens, row, i, inverse_temperature);
    sums.add(Outcome(student.log_share(z, inverse_temperature), bits - teacher.maximum - teacher.log), params);
    if (z == student.maximum && bits == teacher.best) agrees = 1;
  }
  if (bucket && tokens.first == 0 && team.rank == 0) {
    const double a = student.log_share(others.maximum, inverse_temperature) + others.log;
    sums.add(Outcome(a, teacher.tail - teacher.maximum - teacher.log), params);
  }
  for (int i = 0; i < kTopKAgreement; ++i) sums.of[i] = team.total(sums.of[i]);
  agrees = team.largest(agrees);
  if (team.rank != 0) return;
  float* out = params.out + row * kTopKSums;
  for (int i = 0; i < kTopKAgreement; ++i) out[i] = float(sums.of[i]);
  out[kTopKAgreement] = float(agrees);
  ExactLogSum untempered = {0, 0};
  if (params.cross_entropy != nullptr) {
    untempered = combine_untempered(params, row);
    params.cross_entropy[row] = cross_entropy(params, row, untempered);
  }
  params.normalizers[row] = {
      student.rounded(), others.rounded(), untempered.rounded(), {float(teacher.maximum), float(teacher.log)}};
}

GKD_INLINE void combine_row(const TopKCombineParams& params, int64_t row) {
  float* metrics = params.metrics + row * params.metrics_stride;
  for (int i = 0; i < kTopKSums; ++i) {
    double total = 0;
    for (int64_t rank = 0; rank < params.ranks; ++rank) {
      total += params.gathered[(rank * params.rows + row) * kTopKSums + i];
    }
    if (i == kTopKSlope) {
      params.slope_sum[row] = float(total);
    } else {
      metrics[i] = float(i == kTopKAgreement && total > 1 ? 1.0 : total);  // several ranks may have a most likely token
    }
  }
  const float cross_entropy = params.cross_entropy == nullptr ? 0 : params.cross_entropy[row];
  metrics[kTopKSlope] = cross_entropy;
  const float weight = params.token_weights[row];
  double loss = detail::weighted(weight, metrics[kTopKValue]);
  params.weight[row] = weight * params.factor;
  if (params.label_weights != nullptr) {
    const float label_weight = params.labels[row] == kIgnoredLabel ? 0 : params.label_weights[row];
    loss += detail::weighted(label_weight, cross_entropy);
    params.label_weight[row] = label_weight * params.factor;
  }
  params.losses[row] = float(loss);
}

// ---- gradient

// The slope is rounded as the sum of slopes is: where one outcome has all the mass, they cancel.
GKD_INLINE double by_outcome(const TopKGradientParams& params, int64_t row, const Outcome& outcome) {
  const float slope = float(outcome.terms(params.kind, params.beta).slope);
  return slope - detail::weighted(outcome.p, params.slope_sum[row * params.slope_sum_stride]);
}

// What is constant along a row of the gradient: that of a token outside the top-k is
// factor · (its share in the bucket) + label_factor · (its probability at temperature 1).
GKD_INLINE TopKOthers others_of(const TopKGradientParams& params, int64_t row) {
  const TopKNormalizers n = params.normalizers[row];
  TopKOthers others = {};
  others.is_zero = params.weight[row] == 0;
  if (!others.is_zero && params.tokens.tail != nullptr) {
    const double a =
        log_share(n.others.maximum, n.student.maximum, n.student.log, params.inverse_temperature) + n.others.log;
    const Outcome bucket(a, double(params.tokens.tail[row]) - n.teacher.maximum - n.teacher.log);
    others.factor = float(by_outcome(params, row, bucket) * params.weight[row] * params.inverse_temperature);
  }
  others.shift = float(finite(n.others.maximum));
  others.bias = n.others.log * kLog2E;
  others.label = -1;
  others.label_shift = float(finite(n.untempered.maximum));
  others.label_bias = n.untempered.log * kLog2E;
  if (params.label_weight == nullptr || params.label_weight[row] == 0) return others;
  others.is_zero = false;
  others.label_factor = params.label_weight[row];
  const int64_t column = params.labels[row] - params.tokens.first;
  if (column >= 0 && column < params.logits.columns) others.label = int32_t(column);
  return others;
}

// At a logit that is not special, before the softcap.
template <bool kBucket, bool kLabels, class F>
GKD_INLINE F of_other(const TopKOthers& others, float scale, F z) {
  F g = {};
  if constexpr (kBucket) g += others.factor * exp2(log2_prob(z, scale, others.shift, others.bias));
  if constexpr (kLabels) g += others.label_factor * exp2(log2_prob(z, kLog2E, others.label_shift, others.label_bias));
  return g;
}

GKD_INLINE float before_softcap(const TopKGradientParams& params, double gradient, float z) {
  return float(params.inverse_softcap == 0 ? gradient : gradient * softcap_slope(z, params.inverse_softcap));
}

// Of the i-th of the k tokens, which has this logit and column.
GKD_INLINE float of_token(const TopKGradientParams& params, const TopKOthers& others, int64_t row, int64_t i, float z,
                          int64_t column) {
  const TopKNormalizers n = params.normalizers[row];
  double gradient = 0;
  if (params.weight[row] != 0) {
    const double a = log_share(z, n.student.maximum, n.student.log, params.inverse_temperature);
    const double b = teacher_bits(params.tokens, row, i, params.inverse_temperature) - n.teacher.maximum;
    gradient = by_outcome(params, row, Outcome(a, b - n.teacher.log)) * params.weight[row] * params.inverse_temperature;
  }
  if (others.label_factor != 0) {
    gradient += of_other<false, true>(others, 0, z) - (column == others.label ? others.label_factor : 0);
  }
  return before_softcap(params, gradient, z);
}

// Computes what is special in a row from the logits, which the gradient may overwrite.
template <class T, class Team>
GKD_INLINE void prepare_row(const TopKGradientParams& params, int64_t row, const typename T::Element* logits,
                            const Team& team) {
  TopKOthers others = others_of(params, row);
  double label_is_token = 0;
  if (!others.is_zero) {
    for (int64_t i = team.rank; i < params.tokens.k; i += team.size) {
      const int64_t column = own_column(params.tokens, params.logits.columns, row, i);
      if (column < 0) continue;
      params.at_tokens[row * params.tokens.k + i] = of_token(params, others, row, i, T::read(logits, column), column);
      if (column == others.label) label_is_token = 1;
    }
  }
  label_is_token = team.largest(label_is_token);
  if (team.rank != 0) return;
  if (label_is_token != 0) others.label = -1;
  if (others.label >= 0) {
    const float z = T::read(logits, others.label);
    double by_logit = of_other<false, true>(others, 0, z) - others.label_factor;
    if (others.factor != 0) by_logit += of_other<true, false>(others, params.scale, z);
    others.at_label = before_softcap(params, by_logit, z);
  }
  params.others[row] = others;
}

}  // namespace gkd
