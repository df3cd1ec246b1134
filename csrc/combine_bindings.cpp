// The part of megatron_gkd._C that combines the ranks' numbers of each token; megatron_gkd/ops/combine.py calls it.

#include "combine_bindings.h"

#include <string>

#include "arguments.h"
#include "combine.h"
#include "cpu/passes.h"

#ifdef MEGATRON_GKD_WITH_CUDA
#include "cuda/passes.h"
#endif

namespace gkd {
namespace {

using namespace arguments;

constexpr int64_t kElements = 128;  // what a row is worth beside logits, for the size of a task on a CPU

int columns_of(bool has_teacher, bool moments, bool has_labels) {
  return has_teacher ? statistics_columns(moments, has_labels) : int(kAloneColumns);
}

// Null where the tensor is missing.
template <class T>
T* pointer(const optional<Tensor>& x, const char* name, at::ScalarType type, at::IntArrayRef sizes,
           const Tensor& like) {
  if (!x.has_value()) return nullptr;
  check_rows(name, *x, type, sizes, like);
  return static_cast<T*>(x->data_ptr());
}

DivergenceSource source_of(const std::string& divergence) {
  switch (kind_of(divergence)) {
    case DivergenceKind::forward_kl:
      return DivergenceSource::forward_kl;
    case DivergenceKind::reverse_kl:
      return DivergenceSource::reverse_kl;
    default:
      return DivergenceSource::sums;
  }
}

// The statistics [rows, columns] and, with labels, their logits [rows], in one vector for one collective.
Tensor token_statistics(const Tensor& student, const optional<Tensor>& teacher, const optional<Tensor>& mask,
                        const optional<Tensor>& label, double temperature, int64_t first, bool moments) {
  const auto logits = logits_of(student, teacher.has_value() ? &*teacher : nullptr);
  const bool has_labels = label.has_value();
  const int columns = columns_of(logits.has_teacher, moments, has_labels);
  const auto out = at::empty({logits.rows * (columns + (has_labels ? 1 : 0))}, student.options().dtype(at::kFloat));
  StatisticsParams params = {};
  params.logits = logits;
  params.mask = logits.has_teacher ? mask_of(mask, student) : nullptr;
  params.scale = scale_of(temperature);
  params.untempered_scale = has_labels || !logits.has_teacher ? static_cast<float>(kExactLog2E) : 0.0f;
  params.moments = moments;
  params.first = logits.has_teacher ? first : 0;
  params.out = out.mutable_data_ptr<float>();
  start(params, student, GKD_BOTH(statistics));
  if (!has_labels) return out;
  const LabelLogitParams labels = {
      .student = logits.student,
      .stride = logits.student_stride,
      .rows = logits.rows,
      .columns = logits.columns,
      .type = logits.type,
      .first = first,
      .label = pointer<int64_t>(label, "label", at::kLong, {logits.rows}, student),
      .out = params.out + logits.rows * columns,
  };
  start_rows(labels, logits.rows, kElements, student, GKD_BOTH(label_logits));
  return out;
}

using Optionals = std::tuple<optional<Tensor>, optional<Tensor>, optional<Tensor>, optional<Tensor>, optional<Tensor>,
                             optional<Tensor>>;

// Returns normalizers, slope sum, weight, untempered normalizers, label weight and label column: see CombineParams. The
// first two need a teacher, the third token weights, the last three labels.
Optionals combine_statistics(const Tensor& gathered, int64_t rows, bool has_teacher, bool moments,
                             const optional<Tensor>& mask, const optional<Tensor>& label,
                             const optional<Tensor>& token_weight, const optional<Tensor>& label_weight,
                             const optional<Tensor>& metrics, const optional<Tensor>& loss,
                             const std::string& divergence, double temperature, double factor, int64_t first,
                             int64_t valid) {
  const bool has_labels = label.has_value();
  const int columns = columns_of(has_teacher, moments, has_labels);
  const int64_t rank_stride = rows * (columns + (has_labels ? 1 : 0));
  TORCH_CHECK_VALUE(gathered.dim() >= 1 && gathered.is_contiguous() && gathered.scalar_type() == at::kFloat &&
                        gathered.size(0) >= 1 && gathered.numel() == gathered.size(0) * rank_stride,
                    "gathered = ", gathered.scalar_type(), " ", gathered.sizes(), ": must be contiguous ", at::kFloat,
                    " of ", rank_stride, " numbers for each rank");
  TORCH_CHECK_VALUE(!loss.has_value() || token_weight.has_value(), "loss: given without token_weight");
  const auto options = gathered.options();
  Optionals out;
  auto& [normalizers, slope_sum, weight, untempered, scaled_label_weight, label_column] = out;
  const auto source = source_of(divergence);
  TORCH_CHECK_VALUE(!has_teacher || moments || source == DivergenceSource::sums, "divergence = ", divergence,
                    ": needs moments");
  if (has_teacher) {
    normalizers = at::empty({rows, 4}, options);
    if (source != DivergenceSource::sums) slope_sum = at::empty({rows}, options);
  }
  if (token_weight.has_value()) weight = at::empty({rows}, options);
  if (has_labels) {
    untempered = at::empty({2, rows}, options);
    scaled_label_weight = at::empty({rows}, options);
    label_column = at::empty({rows}, options.dtype(at::kLong));
  }
  static_assert(sizeof(RowNormalizers) == 4 * sizeof(float));
  const CombineParams params = {
      .gathered = gathered.const_data_ptr<float>(),
      .ranks = gathered.size(0),
      .rank_stride = rank_stride,
      .rows = rows,
      .columns = columns,
      .has_teacher = has_teacher,
      .moments = moments,
      .scale = scale_of(temperature),
      .mask = pointer<uint8_t>(mask, "mask", at::kBool, {rows}, gathered),
      .label = pointer<int64_t>(label, "label", at::kLong, {rows}, gathered),
      .first = first,
      .valid = valid,
      .source = source,
      .token_weight = pointer<float>(token_weight, "token_weight", at::kFloat, {rows}, gathered),
      .label_weight = pointer<float>(label_weight, "label_weight", at::kFloat, {rows}, gathered),
      .factor = static_cast<float>(factor),
      .normalizers = reinterpret_cast<RowNormalizers*>(
          pointer<float>(normalizers, "normalizers", at::kFloat, {rows, 4}, gathered)),
      .metrics = pointer<float>(metrics, "metrics", at::kFloat, {rows, kMetricColumns}, gathered),
      .loss = pointer<float>(loss, "loss", at::kFloat, {rows}, gathered),
      .slope_sum = pointer<float>(slope_sum, "slope_sum", at::kFloat, {rows}, gathered),
      .weight = pointer<float>(weight, "weight", at::kFloat, {rows}, gathered),
      .untempered = pointer<float>(untempered, "untempered", at::kFloat, {2, rows}, gathered),
      .scaled_label_weight = pointer<float>(scaled_label_weight, "label_weight", at::kFloat, {rows}, gathered),
      .label_column = pointer<int64_t>(label_column, "label_column", at::kLong, {rows}, gathered),
  };
  start_rows(params, rows, kElements, gathered, GKD_BOTH(combine_statistics));
  return out;
}

// Returns the slope sum [rows]; the divergence goes to the metrics, and into the loss.
Tensor combine_sums(const Tensor& gathered, const optional<Tensor>& token_weight, const optional<Tensor>& metrics,
                    const optional<Tensor>& loss) {
  TORCH_CHECK_VALUE(
      gathered.dim() == 3 && gathered.size(2) == 2 && gathered.is_contiguous() && gathered.scalar_type() == at::kFloat,
      "gathered = ", gathered.scalar_type(), " ", gathered.sizes(), ": must be contiguous ", at::kFloat,
      ", ranks by rows by 2");
  TORCH_CHECK_VALUE(!loss.has_value() || token_weight.has_value(), "loss: given without token_weight");
  const auto rows = gathered.size(1);
  const auto slope_sum = at::empty({rows}, gathered.options());
  const CombineSumsParams params = {
      .gathered = gathered.const_data_ptr<float>(),
      .ranks = gathered.size(0),
      .rows = rows,
      .token_weight = pointer<float>(token_weight, "token_weight", at::kFloat, {rows}, gathered),
      .metrics = pointer<float>(metrics, "metrics", at::kFloat, {rows, kMetricColumns}, gathered),
      .loss = pointer<float>(loss, "loss", at::kFloat, {rows}, gathered),
      .slope_sum = slope_sum.mutable_data_ptr<float>(),
  };
  start_rows(params, rows, kElements, gathered, GKD_BOTH(combine_sums));
  return slope_sum;
}

}  // namespace

void define_combine(pybind11::module_& m) {
  const auto release = pybind11::call_guard<pybind11::gil_scoped_release>();
  m.def("token_statistics", &token_statistics, release);
  m.def("combine_statistics", &combine_statistics, release);
  m.def("combine_sums", &combine_sums, release);
}

}  // namespace gkd
