// The loss in one pass over whole rows, for megatron_gkd._C.

#include "loss_bindings.h"

#include <tuple>

#include "arguments.h"

#ifdef MEGATRON_GKD_WITH_CUDA
#include "cuda/passes.h"
#endif

namespace {

using namespace gkd::arguments;

gkd::GradientParams gradient_of(const gkd::Logits& logits, Tensor& out, const Tensor& student, const Tensor& weight,
                                const optional<Tensor>& label_weight, const optional<Tensor>& labels,
                                const std::string& divergence, double beta, double temperature) {
  check_out(out, logits, student);
  check_rows("weight", weight, at::kFloat, {logits.rows}, student);
  if (labels.has_value()) check_rows("labels", *labels, at::kLong, {logits.rows}, student);
  if (label_weight.has_value()) check_rows("label_weight", *label_weight, at::kFloat, {logits.rows}, student);
  TORCH_CHECK_VALUE(labels.has_value() || !label_weight.has_value(), "label_weight: given without labels");
  gkd::GradientParams params = {};
  params.logits = logits;
  params.out = out.mutable_data_ptr();
  params.out_stride = out.stride(0);
  params.width = out.size(1);
  params.scale = scale_of(temperature);
  params.inverse_temperature = static_cast<float>(1 / temperature);
  params.weight = weight.const_data_ptr<float>();
  params.kind = kind_of(divergence);
  params.beta = beta;
  if (label_weight.has_value()) {
    params.label_weight = label_weight->const_data_ptr<float>();
    params.label = labels->const_data_ptr<int64_t>();
  }
  return params;
}

// The gradient into `out`; returns the statistics of `token_statistics`, with moments, and the sums. Nothing is done or
// returned where no kernel can hold a row.
optional<std::tuple<Tensor, Tensor>> loss(Tensor& out, const Tensor& student, const Tensor& teacher,
                                          const Tensor& weight, const optional<Tensor>& label_weight,
                                          const optional<Tensor>& labels, const std::string& divergence, double beta,
                                          double temperature) {
  const auto logits = logits_of(student, &teacher);
  [[maybe_unused]] const auto gradient =
      gradient_of(logits, out, student, weight, label_weight, labels, divergence, beta, temperature);
#ifdef MEGATRON_GKD_WITH_CUDA
  if (student.is_cuda() && logits.rows > 0) {
    const auto options = student.options().dtype(at::kFloat);
    const auto columns = gkd::statistics_columns(true, labels.has_value());
    const auto statistics = at::empty({logits.rows * (columns + (labels.has_value() ? 1 : 0))}, options);
    const auto sums = at::empty({logits.rows, 2}, options);
    auto* out_statistics = statistics.mutable_data_ptr<float>();
    const gkd::LossParams params = {
        .statistics = {.logits = logits,
                       .mask = nullptr,
                       .scale = gradient.scale,
                       .untempered_scale = labels.has_value() ? gkd::kLog2E : 0.0f,
                       .moments = true,
                       .first = 0,
                       .out = out_statistics},
        .gradient = gradient,
        .sums = sums.mutable_data_ptr<float>(),
    };
    const c10::cuda::CUDAGuard guard(student.device());
    const auto stream = c10::cuda::getCurrentCUDAStream().stream();
    if (labels.has_value()) {  // before `out`, which may be the logits, is written
      gkd::cuda::label_logits({.student = logits.student,
                               .stride = logits.student_stride,
                               .rows = logits.rows,
                               .columns = logits.columns,
                               .type = logits.type,
                               .first = 0,
                               .label = labels->const_data_ptr<int64_t>(),
                               .out = out_statistics + logits.rows * columns},
                              stream);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
    if (gkd::cuda::cluster_loss(params, stream)) {
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      return std::make_tuple(statistics, sums);
    }
  }
#endif
  return std::nullopt;
}

}  // namespace

void gkd::define_loss(pybind11::module_& m) {
  m.def("loss", &loss, pybind11::call_guard<pybind11::gil_scoped_release>());
#ifdef MEGATRON_GKD_WITH_CUDA
  m.def("use_clusters", &gkd::cuda::use_clusters);
#endif
}
