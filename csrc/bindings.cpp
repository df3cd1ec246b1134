// The Python module megatron_gkd._C: checks its arguments and starts the kernels.

#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <cmath>
#include <map>
#include <string>

#include "cpu/passes.h"
#include "params.h"

#ifdef MEGATRON_GKD_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/passes.h"
#endif

namespace {

using at::Tensor;
using std::optional;

constexpr double kLog2E = 1.4426950408889634074;

gkd::DivergenceKind kind_of(const std::string& name) {
#define GKD_NAMED_KIND(name, ...) {#name, gkd::DivergenceKind::name},
  static const std::map<std::string, gkd::DivergenceKind> kinds = {GKD_DIVERGENCES(GKD_NAMED_KIND)};
#undef GKD_NAMED_KIND
  const auto found = kinds.find(name);
  TORCH_CHECK_VALUE(found != kinds.end(), "divergence = ", name, ": unknown; GKD_DIVERGENCES lists all");
  return found->second;
}

gkd::FloatType float_type(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case at::kFloat:
      return gkd::FloatType::f32;
    case at::kBFloat16:
      return gkd::FloatType::bf16;
    case at::kHalf:
      return gkd::FloatType::f16;
    default:
      TORCH_CHECK_TYPE(false, "logits = ", logits.scalar_type(), ": must be float32, bfloat16 or float16");
  }
}

void check_logits(const char* name, const Tensor& x, const Tensor& like) {
  TORCH_CHECK_VALUE(
      x.dim() == 2 && x.sizes() == like.sizes() && x.scalar_type() == like.scalar_type() && x.device() == like.device(),
      name, " = ", x.scalar_type(), " ", x.sizes(), " on ", x.device(), ": must be ", like.scalar_type(), " ",
      like.sizes(), " on ", like.device(), ", rows by columns");
  TORCH_CHECK_VALUE(x.size(1) <= 1 || x.stride(1) == 1, name, " = strides ", x.strides(), ": rows must be contiguous");
}

// A contiguous tensor of one row of numbers for each row of logits.
void check_rows(const char* name, const Tensor& x, at::ScalarType type, at::IntArrayRef sizes, const Tensor& logits) {
  TORCH_CHECK_VALUE(x.sizes() == sizes && x.scalar_type() == type && x.device() == logits.device() && x.is_contiguous(),
                    name, " = ", x.scalar_type(), " ", x.sizes(), " on ", x.device(), ": must be a contiguous ", type,
                    " ", sizes, " on ", logits.device());
}

// Within a row, GPU kernels count columns in 32 bits.
void check_width(const char* name, const Tensor& x) {
  constexpr int64_t kMost = (int64_t{1} << 31) - (int64_t{1} << 16);
  TORCH_CHECK_VALUE(x.is_cpu() || x.size(1) <= kMost, name, " = ", x.size(1), " columns: must be at most ", kMost);
}

// `teacher` is null for a pass that reads the student only.
gkd::Logits logits_of(const Tensor& student, const Tensor* teacher) {
  const auto type = float_type(student);
  TORCH_CHECK_VALUE(student.device().is_cpu() || student.device().is_cuda(), "logits on ", student.device(),
                    ": there are no kernels for this device");
  check_logits("student", student, student);
  if (teacher != nullptr) check_logits("teacher", *teacher, student);
  check_width("logits", student);
  return {
      .student = student.const_data_ptr(),
      .teacher = teacher == nullptr ? nullptr : teacher->const_data_ptr(),
      .student_stride = student.stride(0),
      .teacher_stride = teacher == nullptr ? 0 : teacher->stride(0),
      .rows = student.size(0),
      .columns = student.size(1),
      .type = type,
      .has_teacher = teacher != nullptr,
  };
}

const uint8_t* mask_of(const optional<Tensor>& mask, const Tensor& student) {
  if (!mask.has_value()) return nullptr;
  check_rows("mask", *mask, at::kBool, {student.size(0)}, student);
  return static_cast<const uint8_t*>(mask->const_data_ptr());
}

float scale_of(double temperature) {
  const auto inverse = static_cast<float>(1 / temperature);
  TORCH_CHECK_VALUE(temperature > 0 && std::isnormal(inverse), "temperature = ", temperature,
                    ": must be positive, with an inverse that is a normal float");
  return static_cast<float>(kLog2E / temperature);
}

// Rows per task: enough entries to be worth a thread.
int64_t grain(const gkd::Logits& logits) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, logits.columns)); }

template <class Params, class CpuKernel, class CudaKernel>
void start(const Params& params, const Tensor& student, CpuKernel cpu, [[maybe_unused]] CudaKernel cuda) {
  if (params.logits.rows == 0) return;
  if (student.is_cpu()) {
    at::parallel_for(0, params.logits.rows, grain(params.logits),
                     [&](int64_t begin, int64_t end) { cpu(params, begin, end); });
    return;
  }
#ifdef MEGATRON_GKD_WITH_CUDA
  const c10::cuda::CUDAGuard guard(student.device());
  cuda(params, c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
#else
  TORCH_CHECK(false, "logits on ", student.device(),
              ": this build has no CUDA kernels; build with MEGATRON_GKD_CUDA=1 where torch has CUDA");
#endif
}

#ifdef MEGATRON_GKD_WITH_CUDA
#define GKD_BOTH(name) gkd::cpu::name, gkd::cuda::name
#else
#define GKD_BOTH(name) gkd::cpu::name, nullptr
#endif

Tensor statistics(const Tensor& student, const Tensor& teacher, const optional<Tensor>& mask, double temperature,
                  int64_t first, bool moments, bool untempered) {
  const auto logits = logits_of(student, &teacher);
  const auto out =
      at::empty({logits.rows, gkd::statistics_columns(moments, untempered)}, student.options().dtype(at::kFloat));
  const gkd::StatisticsParams params = {
      .logits = logits,
      .mask = mask_of(mask, student),
      .scale = scale_of(temperature),
      .untempered_scale = untempered ? static_cast<float>(kLog2E) : 0.0f,
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
      .untempered_scale = static_cast<float>(kLog2E),
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

void check_out(const Tensor& out, const gkd::Logits& logits, const Tensor& student) {
  TORCH_CHECK_VALUE(out.dim() == 2 && out.size(0) == logits.rows && out.size(1) >= logits.columns &&
                        out.scalar_type() == student.scalar_type() && out.device() == student.device() &&
                        (out.size(1) <= 1 || out.stride(1) == 1),
                    "out = ", out.scalar_type(), " ", out.sizes(), " on ", out.device(), " with strides ",
                    out.strides(), ": must be ", student.scalar_type(), " of at least ", student.sizes(), " on ",
                    student.device(), ", with contiguous rows");
  check_width("out", out);
}

float cap_of(double softcap) {
  const auto cap = static_cast<float>(softcap), inverse = static_cast<float>(1 / softcap);
  TORCH_CHECK_VALUE(cap > 0 && std::isnormal(cap) && std::isnormal(inverse), "softcap = ", softcap,
                    ": must be a positive normal float, and so must its inverse");
  return cap;
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
  m.def("cpu_capability", &gkd::cpu::capability, "avx512, avx2 or default");
#ifdef MEGATRON_GKD_WITH_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
}
