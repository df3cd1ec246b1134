// The Python module megatron_gkd._C: checks its arguments and starts the kernels.

#include "arguments.h"
#include "combine_bindings.h"
#include "cpu/passes.h"
#include "loss_bindings.h"
#include "top_k_bindings.h"

#ifdef MEGATRON_GKD_WITH_CUDA
#include "cuda/passes.h"
#endif

namespace {

using namespace gkd::arguments;

Tensor statistics(const Tensor& student, const Tensor& teacher, const optional<Tensor>& mask, double temperature,
                  int64_t first, bool moments, bool untempered) {
  const auto logits = logits_of(student, &teacher);
  const auto out =
      at::empty({logits.rows, gkd::statistics_columns(moments, untempered)}, student.options().dtype(at::kFloat));
  const gkd::StatisticsParams params = {
      .logits = logits,
      .mask = mask_of(mask, student),
      .scale = scale_of(temperature),
      .untempered_scale = untempered ? gkd::kLog2E : 0.0f,
      .moments = moments,
      .first = first,
      .out = out.mutable_data_ptr<float>(),
  };
  start(params, student, GKD_BOTH(statistics));
  return out;
}

Tensor student_statistics(const Tensor& student, double temperature) {
  const auto logits = logits_of(student, nullptr);
  const auto out = at::empty({logits.rows, gkd::kAloneColumns}, student.options().dtype(at::kFloat));
  const gkd::StatisticsParams params = {
      .logits = logits,
      .mask = nullptr,
      .scale = scale_of(temperature),
      .untempered_scale = gkd::kLog2E,
      .moments = true,
      .first = 0,
      .out = out.mutable_data_ptr<float>(),
  };
  start(params, student, GKD_BOTH(statistics));
  return out;
}

const gkd::RowNormalizers* normalizers_of(const Tensor& normalizers, const Tensor& student) {
  static_assert(sizeof(gkd::RowNormalizers) == 4 * sizeof(float));
  check_rows("normalizers", normalizers, at::kFloat, {student.size(0), 4}, student);
  return reinterpret_cast<const gkd::RowNormalizers*>(normalizers.const_data_ptr<float>());
}

Tensor sums(const Tensor& student, const Tensor& teacher, const optional<Tensor>& mask, const Tensor& normalizers,
            const std::string& divergence, double beta, double temperature) {
  const auto logits = logits_of(student, &teacher);
  const auto kind = kind_of(divergence);
  TORCH_CHECK_VALUE(kind != gkd::DivergenceKind::forward_kl && kind != gkd::DivergenceKind::reverse_kl,
                    "divergence = ", divergence,
                    ": has no sums of its own; they are among the statistics with moments");
  const auto out = at::empty({logits.rows, 2}, student.options().dtype(at::kFloat));
  const gkd::SumsParams params = {
      .logits = logits,
      .mask = mask_of(mask, student),
      .scale = scale_of(temperature),
      .normalizers = normalizers_of(normalizers, student),
      .kind = kind,
      .beta = beta,
      .out = out.mutable_data_ptr<float>(),
  };
  start(params, student, GKD_BOTH(sums));
  return out;
}

// The parameters of the gradient without divergence and labels: it writes zeros.
gkd::GradientParams empty_gradient(Tensor& out, const gkd::Logits& logits, const Tensor& student,
                                   const optional<double>& softcap) {
  check_out(out, logits, student);
  return {
      .logits = logits,
      .out = out.mutable_data_ptr(),
      .out_stride = out.stride(0),
      .width = out.size(1),
      .scale = 1,
      .inverse_temperature = 1,
      .normalizers = nullptr,
      .slope_sum = nullptr,
      .weight = nullptr,
      .kind = gkd::DivergenceKind::forward_kl,
      .beta = 0,
      .label_weight = nullptr,
      .label_shift = nullptr,
      .label_bias = nullptr,
      .label = nullptr,
      .inverse_softcap = softcap.has_value() ? 1 / cap_of(*softcap) : 0,
  };
}

void add_labels(gkd::GradientParams& params, const Tensor& untempered, const Tensor& label_weight, const Tensor& label,
                const Tensor& student) {
  const auto rows = params.logits.rows;
  check_rows("untempered", untempered, at::kFloat, {2, rows}, student);
  check_rows("label_weight", label_weight, at::kFloat, {rows}, student);
  check_rows("label", label, at::kLong, {rows}, student);
  params.label_weight = label_weight.const_data_ptr<float>();
  params.label_shift = untempered.const_data_ptr<float>();
  params.label_bias = untempered.const_data_ptr<float>() + rows;
  params.label = label.const_data_ptr<int64_t>();
}

void gradient(Tensor& out, const Tensor& student, const Tensor& teacher, const Tensor& normalizers,
              const Tensor& slope_sum, const Tensor& weight, const optional<Tensor>& untempered,
              const optional<Tensor>& label_weight, const optional<Tensor>& label, const std::string& divergence,
              double beta, double temperature, const optional<double>& softcap) {
  const auto logits = logits_of(student, &teacher);
  auto params = empty_gradient(out, logits, student, softcap);
  check_rows("slope_sum", slope_sum, at::kFloat, {logits.rows}, student);
  check_rows("weight", weight, at::kFloat, {logits.rows}, student);
  params.scale = scale_of(temperature);
  params.inverse_temperature = static_cast<float>(1 / temperature);
  params.normalizers = normalizers_of(normalizers, student);
  params.slope_sum = slope_sum.const_data_ptr<float>();
  params.weight = weight.const_data_ptr<float>();
  params.kind = kind_of(divergence);
  params.beta = beta;
  TORCH_CHECK_VALUE(untempered.has_value() == label_weight.has_value() && label.has_value() == label_weight.has_value(),
                    "untempered, label_weight, label: only some are given; give all or none");
  if (label_weight.has_value()) add_labels(params, *untempered, *label_weight, *label, student);
  start(params, student, GKD_BOTH(gradient));
}

void cross_entropy_gradient(Tensor& out, const Tensor& student, const Tensor& untempered, const Tensor& label_weight,
                            const Tensor& label, const optional<double>& softcap) {
  auto params = empty_gradient(out, logits_of(student, nullptr), student, softcap);
  add_labels(params, untempered, label_weight, label, student);
  start(params, student, GKD_BOTH(gradient));
}

void softcap(Tensor& logits, double cap) {
  const gkd::SoftcapParams params = {
      .logits = logits_of(logits, nullptr),
      .out = logits.mutable_data_ptr(),
      .out_stride = logits.stride(0),
      .cap = cap_of(cap),
  };
  start(params, logits, GKD_BOTH(softcap));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled passes of the vocabulary-parallel divergence; their Python callers are in megatron_gkd.ops.";
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("statistics", &statistics, release);
  m.def("student_statistics", &student_statistics, release);
  m.def("sums", &sums, release);
  m.def("gradient", &gradient, release);
  m.def("cross_entropy_gradient", &cross_entropy_gradient, release);
  m.def("softcap", &softcap, release);
  gkd::define_combine(m);
  gkd::define_loss(m);
  gkd::define_top_k(m);
  m.def("cpu_capability", &gkd::cpu::capability, "avx512, avx2 or default");
#ifdef MEGATRON_GKD_WITH_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
}
