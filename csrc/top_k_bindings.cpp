// The functions of the Python module for a top-k; their callers are in megatron_gkd/ops/topk_passes.py.

#include "top_k_bindings.h"

#include <tuple>

#include "arguments.h"
#include "cpu/top_k.h"

#ifdef MEGATRON_GKD_WITH_CUDA
#include "cuda/top_k.h"
#endif

namespace gkd {
namespace {

using namespace gkd::arguments;

template <class T>
const T* data_of(const optional<Tensor>& x) {
  return x.has_value() ? x->const_data_ptr<T>() : nullptr;
}

int32_t* words_of(Tensor& x) { return x.mutable_data_ptr<int32_t>(); }

Tensor top_k_select(const Tensor& logits, int64_t k, const optional<double>& temperature, int64_t first) {
  const auto checked = logits_of(logits, nullptr);
  TORCH_CHECK_VALUE(k >= 1 && (logits.is_cpu() || k <= kMostPlaces), "k = ", k, ": must be from 1 to ", kMostPlaces);
  auto out = at::empty({checked.rows, candidate_words(k, temperature.has_value())}, logits.options().dtype(at::kInt));
  const TopKSelectParams params = {
      .logits = checked,
      .k = k,
      .scale = temperature.has_value() ? scale_of(*temperature) : 0,
      .first = first,
      .out = words_of(out),
  };
  start(params, logits, GKD_BOTH(top_k_select));
  return out;
}

std::tuple<Tensor, Tensor, optional<Tensor>> top_k_merge(const Tensor& gathered, int64_t places, int64_t k,
                                                         const optional<double>& temperature) {
  const bool tail = temperature.has_value();
  TORCH_CHECK_VALUE(gathered.dim() == 3 && gathered.scalar_type() == at::kInt && gathered.is_contiguous() &&
                        gathered.size(2) == candidate_words(places, tail) && k >= 1 && k <= gathered.size(0) * places,
                    "gathered = ", gathered.scalar_type(), " ", gathered.sizes(), ": must be contiguous, of ",
                    candidate_words(places, tail), " words, for k = ", k);
  const auto rows = gathered.size(1);
  const auto floats = gathered.options().dtype(at::kFloat);
  auto ids = at::empty({rows, k}, gathered.options().dtype(at::kLong)), values = at::empty({rows, k}, floats);
  optional<Tensor> tails;
  if (tail) tails = at::empty({rows}, floats);
  const TopKMergeParams params = {
      .gathered = gathered.const_data_ptr<int32_t>(),
      .ranks = gathered.size(0),
      .rows = rows,
      .places = places,
      .k = k,
      .inverse_temperature = 1 / temperature.value_or(1),
      .ids = ids.mutable_data_ptr<int64_t>(),
      .values = values.mutable_data_ptr<float>(),
      .tail = tail ? tails->mutable_data_ptr<float>() : nullptr,
  };
  start_rows(params, rows, k, gathered, GKD_BOTH(top_k_merge));
  return {ids, values, tails};
}

TopKTokens tokens_of(const Tensor& ids, const Tensor* values, const optional<Tensor>& tail, int64_t first,
                     int64_t vocabulary, const Tensor& student) {
  TORCH_CHECK_VALUE(ids.dim() == 2, "ids = ", ids.sizes(), ": must be [N, k]");
  check_rows("ids", ids, at::kLong, {student.size(0), ids.size(1)}, student);
  if (values != nullptr) check_rows("values", *values, at::kFloat, ids.sizes(), student);
  if (tail.has_value()) check_rows("tail", *tail, at::kFloat, {student.size(0)}, student);
  return {
      .ids = ids.const_data_ptr<int64_t>(),
      .values = values == nullptr ? nullptr : values->const_data_ptr<float>(),
      .tail = data_of<float>(tail),
      .k = ids.size(1),
      .first = first,
      .vocabulary = vocabulary,
  };
}

const int64_t* labels_of(const optional<Tensor>& labels, const Tensor& student) {
  if (labels.has_value()) check_rows("labels", *labels, at::kLong, {student.size(0)}, student);
  return data_of<int64_t>(labels);
}

Tensor top_k_statistics(const Tensor& student, const Tensor& ids, const optional<Tensor>& labels, double temperature,
                        bool bucket, int64_t first) {
  const int columns = labels.has_value() ? kLabelColumns : bucket ? kPartsColumns : kTopColumns;
  const auto logits = logits_of(student, nullptr);
  const auto out = at::empty({logits.rows, columns}, student.options().dtype(at::kFloat));
  const TopKStatisticsParams params = {
      .logits = logits,
      .tokens = tokens_of(ids, nullptr, {}, first, 0, student),
      .scale = scale_of(temperature),
      .inverse_temperature = 1 / temperature,
      .columns = columns,
      .labels = labels_of(labels, student),
      .out = out.mutable_data_ptr<float>(),
  };
  start(params, student, GKD_BOTH(top_k_statistics));
  return out;
}

constexpr int64_t kNormalizerFloats = sizeof(TopKNormalizers) / sizeof(float);

std::tuple<Tensor, Tensor, optional<Tensor>> top_k_sums(const Tensor& student, const Tensor& ids, const Tensor& values,
                                                        const optional<Tensor>& tail, const Tensor& gathered,
                                                        const optional<Tensor>& labels, const std::string& divergence,
                                                        double beta, double temperature, int64_t first,
                                                        int64_t vocabulary) {
  const auto logits = logits_of(student, nullptr);
  const int columns = labels.has_value() ? kLabelColumns : tail.has_value() ? kPartsColumns : kTopColumns;
  TORCH_CHECK_VALUE(gathered.dim() == 3, "gathered = ", gathered.sizes(), ": must be [R, N, ", columns, "]");
  check_rows("gathered", gathered, at::kFloat, {gathered.size(0), logits.rows, columns}, student);
  const auto floats = student.options().dtype(at::kFloat);
  auto normalizers = at::empty({logits.rows, kNormalizerFloats}, floats);
  auto out = at::empty({logits.rows, kTopKSums}, floats);
  optional<Tensor> cross_entropy;
  if (labels.has_value()) cross_entropy = at::empty({logits.rows}, floats);
  const TopKSumsParams params = {
      .logits = logits,
      .tokens = tokens_of(ids, &values, tail, first, vocabulary, student),
      .gathered = gathered.const_data_ptr<float>(),
      .ranks = gathered.size(0),
      .columns = columns,
      .inverse_temperature = 1 / temperature,
      .kind = kind_of(divergence),
      .beta = beta,
      .labels = labels_of(labels, student),
      .normalizers = reinterpret_cast<TopKNormalizers*>(normalizers.mutable_data_ptr<float>()),
      .out = out.mutable_data_ptr<float>(),
      .cross_entropy = cross_entropy.has_value() ? cross_entropy->mutable_data_ptr<float>() : nullptr,
  };
  start_rows(params, logits.rows, 8 * params.tokens.k, student, GKD_BOTH(top_k_sums));
  return {normalizers, out, cross_entropy};
}

std::tuple<Tensor, Tensor, optional<Tensor>> top_k_combine(const Tensor& gathered,
                                                           const optional<Tensor>& cross_entropy,
                                                           const Tensor& token_weights, const optional<Tensor>& labels,
                                                           const optional<Tensor>& label_weights, double factor,
                                                           Tensor& metrics, Tensor& losses) {
  TORCH_CHECK_VALUE(gathered.dim() == 3, "gathered = ", gathered.sizes(), ": must be [R, N, ", int(kTopKSums), "]");
  const auto rows = gathered.size(1);
  const auto check = [&](const char* name, const optional<Tensor>& x, at::ScalarType type) {
    if (x.has_value()) check_rows(name, *x, type, {rows}, gathered);
  };
  check_rows("gathered", gathered, at::kFloat, {gathered.size(0), rows, kTopKSums}, gathered);
  check("cross_entropy", cross_entropy, at::kFloat);
  check("token_weights", token_weights, at::kFloat);
  check("labels", labels, at::kLong);
  check("label_weights", label_weights, at::kFloat);
  check("losses", losses, at::kFloat);
  TORCH_CHECK_VALUE(labels.has_value() == label_weights.has_value(), "labels, label_weights: give both or neither");
  TORCH_CHECK_VALUE(metrics.dim() == 2 && metrics.size(0) == rows && metrics.size(1) == kTopKSums &&
                        metrics.stride(1) == 1 && metrics.scalar_type() == at::kFloat,
                    "metrics = ", metrics.scalar_type(), " ", metrics.sizes(), ": must be float [N, ", int(kTopKSums),
                    "]");
  auto slope_sum = at::empty({rows}, gathered.options()), weight = at::empty({rows}, gathered.options());
  optional<Tensor> label_weight;
  if (label_weights.has_value()) label_weight = at::empty({rows}, gathered.options());
  const TopKCombineParams params = {
      .gathered = gathered.const_data_ptr<float>(),
      .ranks = gathered.size(0),
      .rows = rows,
      .cross_entropy = data_of<float>(cross_entropy),
      .token_weights = token_weights.const_data_ptr<float>(),
      .labels = data_of<int64_t>(labels),
      .label_weights = data_of<float>(label_weights),
      .factor = static_cast<float>(factor),
      .metrics = metrics.mutable_data_ptr<float>(),
      .metrics_stride = metrics.stride(0),
      .losses = losses.mutable_data_ptr<float>(),
      .slope_sum = slope_sum.mutable_data_ptr<float>(),
      .weight = weight.mutable_data_ptr<float>(),
      .label_weight = label_weight.has_value() ? label_weight->mutable_data_ptr<float>() : nullptr,
  };
  start_rows(params, rows, kTopKSums, gathered, GKD_BOTH(top_k_combine));
  return {slope_sum, weight, label_weight};
}

void top_k_gradient(Tensor& out, const Tensor& student, const Tensor& ids, const Tensor& values,
                    const optional<Tensor>& tail, const Tensor& normalizers, const Tensor& slope_sum,
                    const Tensor& weight, const optional<Tensor>& labels, const optional<Tensor>& label_weight,
                    const std::string& divergence, double beta, double temperature, int64_t first, int64_t vocabulary,
                    const optional<double>& softcap) {
  const auto logits = logits_of(student, nullptr);
  check_out(out, logits, student);
  check_rows("normalizers", normalizers, at::kFloat, {logits.rows, kNormalizerFloats}, student);
  check_rows("weight", weight, at::kFloat, {logits.rows}, student);
  TORCH_CHECK_VALUE(slope_sum.dim() == 1 && slope_sum.size(0) == logits.rows && slope_sum.scalar_type() == at::kFloat,
                    "slope_sum = ", slope_sum.scalar_type(), " ", slope_sum.sizes(), ": must be float [N]");
  TORCH_CHECK_VALUE(labels.has_value() == label_weight.has_value(), "labels, label_weight: give both or neither");
  if (label_weight.has_value()) check_rows("label_weight", *label_weight, at::kFloat, {logits.rows}, student);
  const auto floats = student.options().dtype(at::kFloat);
  constexpr int64_t kOthersFloats = sizeof(TopKOthers) / sizeof(float);
  auto others = at::empty({logits.rows, kOthersFloats}, floats), at_tokens = at::empty_like(values);
  const TopKGradientParams params = {
      .logits = logits,
      .tokens = tokens_of(ids, &values, tail, first, vocabulary, student),
      .out = out.mutable_data_ptr(),
      .out_stride = out.stride(0),
      .width = out.size(1),
      .scale = scale_of(temperature),
      .inverse_temperature = 1 / temperature,
      .kind = kind_of(divergence),
      .beta = beta,
      .normalizers = reinterpret_cast<const TopKNormalizers*>(normalizers.const_data_ptr<float>()),
      .slope_sum = slope_sum.const_data_ptr<float>(),
      .slope_sum_stride = slope_sum.stride(0),
      .weight = weight.const_data_ptr<float>(),
      .label_weight = data_of<float>(label_weight),
      .labels = labels_of(labels, student),
      .inverse_softcap = softcap.has_value() ? 1 / cap_of(*softcap) : 0,
      .others = reinterpret_cast<TopKOthers*>(others.mutable_data_ptr<float>()),
      .at_tokens = at_tokens.mutable_data_ptr<float>(),
  };
  start(params, student, GKD_BOTH(top_k_gradient));
}

}  // namespace

void define_top_k(py::module_& m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("top_k_select", &top_k_select, release);
  m.def("top_k_merge", &top_k_merge, release);
  m.def("top_k_statistics", &top_k_statistics, release);
  m.def("top_k_sums", &top_k_sums, release);
  m.def("top_k_combine", &top_k_combine, release);
  m.def("top_k_gradient", &top_k_gradient, release);
  m.attr("most_places") = kMostPlaces;
}

}  // namespace gkd
