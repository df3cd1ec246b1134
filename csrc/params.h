// The parameters of the kernels: plain pointers and numbers, the same for CPU and CUDA, without torch headers.
//
// Logits are [rows, columns] of one float type for student and teacher, each row contiguous, rows `*_stride` elements
// apart. `columns` counts the true vocabulary of this shard only: columns past it are not read. Statistics are fp32.

#pragma once

#include <cstdint>

#include "divergences.h"

namespace gkd {

enum class FloatType { f32, bf16, f16 };

struct Logits {
  const void* student;
  const void* teacher;
  int64_t student_stride;
  int64_t teacher_stride;
  int64_t rows;
  int64_t columns;
  FloatType type;
  bool has_teacher;  // false where a pass reads the student only. Pointers do not show it: without columns all are null
};

// The columns that `statistics` writes, for each row. With m the maximum over this shard's columns, t = scale (z - m) in
// bits (0 in place of m where a shard has no finite entry) and e = 2^t, sums run over this shard's columns.
enum StatisticsColumn {
  kStudentMaximum,
  kStudentSum,  // sum of e_S
  kTeacherMaximum,
  kTeacherSum,
  kLogSumColumns,
  // Only with `moments`:
  kStudentMoment = kLogSumColumns,  // sum of e_S t_S
  kStudentGap,                      // sum of e_S (t_S - t_T)
  kStudentTop,                      // global id of the student's maximum, the lowest one
  kTeacherMoment,
  kTeacherGap,  // sum of e_T (t_T - t_S)
  kTeacherTop,
  kMomentColumns,
  // Only with `untempered_scale`, as the last column: sum of 2^(untempered_scale (z_S - m_S))
};

// The columns that `statistics` writes without a teacher, which needs `moments` and `untempered_scale`.
enum StudentStatisticsColumn {
  kAloneMaximum,
  kAloneSum,
  kAloneMoment,
  kAloneUntempered,
  kAloneColumns,
};

struct StatisticsParams {
  Logits logits;
  const uint8_t* mask;     // [rows] or null; rows of 0 are not read and get maximum 0, sum 1 and 0 elsewhere
  float scale;             // log2(e) / temperature
  float untempered_scale;  // log2(e), or 0 to leave that column out
  bool moments;
  int64_t first;  // global id of the first column
  float* out;     // [rows, statistics_columns(...)], or without a teacher [rows, kAloneColumns]
};

constexpr int statistics_columns(bool moments, bool untempered) {
  return (moments ? kMomentColumns : kLogSumColumns) + (untempered ? 1 : 0);
}

// log2 of a probability is scale (z - shift) - bias, with these numbers of a row.
struct RowNormalizers {
  float student_shift;
  float student_bias;
  float teacher_shift;
  float teacher_bias;
};

struct SumsParams {
  Logits logits;
  const uint8_t* mask;  // [rows] or null; rows of 0 are not read and get sums of 0
  float scale;
  const RowNormalizers* normalizers;  // [rows]
  DivergenceKind kind;
  double beta;
  float* out;  // [rows, 2]: sum of values in nats; sum of slopes, without their scale
};

struct GradientParams {
  Logits logits;
  void* out;  // [rows, width], of the logits' type; may be the student's or the teacher's logits themselves
  int64_t out_stride;
  int64_t width;  // columns from logits.columns up to here become 0
  float scale;
  float inverse_temperature;
  const RowNormalizers* normalizers;  // [rows]
  const float* slope_sum;             // [rows], over the whole vocabulary, without its scale
  const float* weight;                // [rows]; where it is 0 the divergence adds exactly 0 and the teacher is not read
  // `normalizers`, `slope_sum`, `weight` and the teacher are null without a divergence.
  DivergenceKind kind;
  double beta;
  // Cross-entropy at temperature 1; all null without it.
  const float* label_weight;  // [rows]; where it is 0 the cross-entropy adds exactly 0
  const float* label_shift;   // [rows], of the untempered student
  const float* label_bias;    // [rows]
  const int64_t* label;       // [rows]: this shard's column of the label, or -1 where another shard has it
  float inverse_softcap;      // where the student's logits have a softcap, 1 / cap, the cap rounded to their type: the
                              // gradient is by what they were before it; 0 without one
};

// All three passes over whole rows, with moments and slopes that the kernel itself combines: this rank has the whole
// vocabulary. Both parts have the same logits and scale.
struct LossParams {
  StatisticsParams statistics;  // with moments, without a mask
  GradientParams gradient;  // `normalizers`, `slope_sum`, `label_shift` and `label_bias` are null; with a divergence
  float* sums;              // [rows, 2], as SumsParams::out; not written for the KL divergences
};

struct SoftcapParams {
  Logits logits;  // without a teacher
  void* out;      // [rows, columns], of the logits' type; may be the logits themselves
  int64_t out_stride;
  float cap;
};

}  // namespace gkd
