// The passes of the divergence over a teacher's k most likely tokens: parameters, and how logits are put in order.
//
//   select      one read of the teacher's logits (two on a GPU)      its k largest of this shard, and the others' sum
//   merge       of the ranks' candidates: the k largest of all
//   statistics  one read of the student's logits                     sums over the k tokens and over the others
//   sums        of the k tokens and the others as one outcome        value, slope and metrics of the divergence
//   combine     of the ranks' sums: metrics and losses
//   gradient    one read, one write
//
// A collective follows `select`, `statistics` and `sums`. Logits are `student` of params.h; statistics are fp32.

#pragma once

#include "combine.h"
#include "params.h"

namespace gkd {

constexpr int64_t kMissing = -1;  // an id that does not count

// ---- order: larger logits first, among equal ones the lower column; NaN before all, and -0 equals 0

GKD_INLINE uint32_t order_of(float z) {
  if (z != z) return 0xFFFFFFFFu;
  const auto bits = static_cast<uint32_t>(Lanes<float>::bits(z == 0 ? 0.0f : z));
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

GKD_INLINE float logit_of(uint32_t order) {
  return Lanes<float>::from_bits(static_cast<int32_t>(order >> 31 ? order & 0x7FFFFFFFu : ~order));
}

// A column and its logit as a number that is larger for what comes first. 0 is none.
GKD_INLINE uint64_t pack_candidate(float z, uint32_t column) { return uint64_t(order_of(z)) << 32 | (~column); }
GKD_INLINE uint32_t column_of(uint64_t candidate) { return ~static_cast<uint32_t>(candidate); }
GKD_INLINE uint32_t order_of(uint64_t candidate) { return static_cast<uint32_t>(candidate >> 32); }

// ---- the teacher

// Words of a shard's candidates, for each row: `k` logits, with a tail the maximum and the sum of exponentials of all
// other columns, `k` global ids. All are 32 bits wide.
struct TopKSelectParams {
  Logits logits;
  int64_t k;      // places; those that the columns do not fill get -inf and kMissing
  float scale;    // log2(e) / temperature of the tail; 0 without one
  int64_t first;  // global id of the first column
  int32_t* out;   // [rows, words]
};

GKD_INLINE int64_t candidate_words(int64_t k, bool tail) { return 2 * k + (tail ? 2 : 0); }

// On a GPU: more places than this need too much shared memory.
constexpr int64_t kMostPlaces = 1024;

struct TopKMergeParams {
  const int32_t* gathered;  // [ranks, rows, words]
  int64_t ranks;
  int64_t rows;
  int64_t places;  // of a rank
  int64_t k;
  double inverse_temperature;  // of the tail
  int64_t* ids;                // [rows, k]
  float* values;               // [rows, k], less the largest of the row
  float* tail;                 // [rows], or null
};

// ---- the student

struct TopKTokens {
  const int64_t* ids;   // [rows, k], global
  const float* values;  // [rows, k]
  const float* tail;    // [rows]; null without a bucket
  int64_t k;
  int64_t first;       // global id of the shard's first column
  int64_t vocabulary;  // ids from here on do not count
};

// The columns that `statistics` writes. Exponentials are relative to the maximum of their part, or 0 if that is -inf.
enum TopKStatisticsColumn {
  kTopMaximum,
  kTopSum,
  kTopColumns,
  // With a bucket or labels:
  kOthersMaximum = kTopColumns,
  kOthersSum,
  kPartsColumns,
  // With labels:
  kUntemperedSum = kPartsColumns,  // of both parts, at temperature 1, relative to the larger maximum
  kLabelLogit,                     // -inf where this shard does not have the label
  kLabelColumns,
};

struct TopKStatisticsParams {
  Logits logits;
  TopKTokens tokens;  // ids only
  float scale;        // log2(e) / temperature
  double inverse_temperature;
  int columns;            // one of the ends of parts above
  const int64_t* labels;  // [rows], global ids; null without kLabelColumns
  float* out;             // [rows, columns]
};

// What turns logits into log-probabilities: ln p = (z - maximum) / temperature - log, in nats.
struct LogSum {
  float maximum;  // -inf where all are, and then 0 in its place in the formula
  float log;
};

struct TopKNormalizers {
  LogSum student;     // over the k tokens; with a bucket over all
  LogSum others;      // over the bucket's tokens
  LogSum untempered;  // over all at temperature 1, with labels
  LogSum teacher;     // over the outcomes
};

// Sums over the outcomes. On each rank those of its own ids; the bucket counts on the first. In the order of the metrics
// of a token (PerToken in ops/params.py), whose second is the cross-entropy.
enum TopKSumsColumn {
  kTopKValue,
  kTopKSlope,
  kTopKTeacherEntropy,
  kTopKStudentEntropy,
  kTopKForwardKl,
  kTopKReverseKl,
  kTopKAgreement,
  kTopKSums,
};

struct TopKSumsParams {
  Logits logits;
  TopKTokens tokens;
  const float* gathered;  // [ranks, rows, columns], the statistics of all ranks
  int64_t ranks;
  int columns;
  double inverse_temperature;
  DivergenceKind kind;
  double beta;
  const int64_t* labels;         // [rows], or null
  TopKNormalizers* normalizers;  // [rows]
  float* out;                    // [rows, kTopKSums]
  float* cross_entropy;          // [rows]; null without labels
};

// What the gradient of a row outside the k tokens is made of; see others_of.
struct TopKOthers {
  float factor, shift, bias;
  float label_factor, label_shift, label_bias;
  float at_label;   // the gradient at the label
  int32_t label;    // this shard's column; -1 where it is another's, or one of the k tokens'
  int32_t is_zero;  // whether the whole row is
};

struct TopKCombineParams {
  const float* gathered;  // [ranks, rows, kTopKSums]
  int64_t ranks;
  int64_t rows;
  const float* cross_entropy;  // [rows], or null
  const float* token_weights;  // [rows]
  const int64_t* labels;       // [rows], with the label weights, or both null
  const float* label_weights;
  float factor;  // of the weights that are written
  float* metrics;
  int64_t metrics_stride;
  float* losses;
  float* slope_sum;  // all [rows]
  float* weight;
  float* label_weight;  // null without label weights
};

struct TopKGradientParams {
  Logits logits;
  TopKTokens tokens;
  void* out;  // [rows, width], of the logits' type; may be the logits themselves
  int64_t out_stride;
  int64_t width;  // columns from logits.columns up to here become 0
  float scale;    // log2(e) / temperature
  double inverse_temperature;
  DivergenceKind kind;
  double beta;
  const TopKNormalizers* normalizers;  // [rows]
  const float* slope_sum;              // [rows], over all outcomes
  int64_t slope_sum_stride;
  const float* weight;        // [rows]; where it is 0 the divergence adds exactly 0
  const float* label_weight;  // [rows]; null without a cross-entropy
  const int64_t* labels;
  float inverse_softcap;  // see GradientParams
  // Written before the gradient:
  TopKOthers* others;  // [rows]
  float* at_tokens;    // [rows, k]
};

}  // namespace gkd
