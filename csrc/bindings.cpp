// The Python module megatron_gkd._C: checks what it is given, says what is wrong, and starts the kernels.

#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <cmath>
#include <map>
#include <string>

#include "cpu/cpu.h"
#include "params.h"

#ifdef MEGATRON_GKD_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/cuda.h"
#endif

namespace {

using at::Tensor;
using std::optional;

constexpr double kLog2E = 1.4426950408889634074;

gkd::DivergenceKind kind_of(const std::string& name) {
  static const std::map<std::string, gkd::DivergenceKind> kinds = {
      {"generalized_jsd", gkd::DivergenceKind::generalized_jsd},
      {"forward_kl", gkd::DivergenceKind::forward_kl},
      {"reverse_kl", gkd::DivergenceKind::reverse_kl},
      {"total_variation", gkd::DivergenceKind::total_variation},
      {"skewed_forward_kl", gkd::DivergenceKind::skewed_forward_kl},
      {"skewed_reverse_kl", gkd::DivergenceKind::skewed_reverse_kl},
      {"alpha", gkd::DivergenceKind::alpha},
  };
  const auto found = kinds.find(name);
  TORCH_CHECK_VALUE(found != kinds.end(), "no divergence is called ", name);
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
      TORCH_CHECK_TYPE(false, "logits are ", logits.scalar_type(), "; allowed are float32, bfloat16 and float16");
  }
}

void check_logits(const char* name, const Tensor& x, const Tensor& like) {
  TORCH_CHECK_VALUE(
      x.dim() == 2 && x.sizes() == like.sizes() && x.scalar_type() == like.scalar_type() && x.device() == like.device(),
      name, " is ", x.scalar_type(), " ", x.sizes(), " on ", x.device(), "; it must be ", like.scalar_type(), " ",
      like.sizes(), " on ", like.device(), ", rows by columns");
  TORCH_CHECK_VALUE(x.size(1) <= 1 || x.stride(1) == 1, name, "'s rows must be contiguous; strides are ", x.strides());
}

// A contiguous tensor of one row of numbers for each row of logits.
void check_rows(const char* name, const Tensor& x, at::ScalarType type, at::IntArrayRef sizes, const Tensor& logits) {
  TORCH_CHECK_VALUE(
      x.sizes() == sizes && x.scalar_type() == type && x.device() == logits.device() && x.is_contiguous(), name, " is ",
      x.scalar_type(), " ", x.sizes(), " on ", x.device(), "; it must be a contiguous ", type, " ", sizes, " on ",
      logits.device());
}

// Within a row, GPU kernels count columns in 32 bits.
void check_width(const char* name, const Tensor& x) {
  constexpr int64_t kMost = (int64_t{1} << 31) - (int64_t{1} << 16);
  TORCH_CHECK_VALUE(x.is_cpu() || x.size(1) <= kMost, name, " have ", x.size(1), " columns; allowed are ", kMost);
}

gkd::Logits logits_of(const Tensor& student, const Tensor& teacher) {
  const auto type = float_type(student);
  TORCH_CHECK_VALUE(student.device().is_cpu() || student.device().is_cuda(), "no kernels for ", student.device());
  check_logits("student", student, student);
  check_logits("teacher", teacher, student);
  check_width("logits", student);
  return {student.const_data_ptr(), teacher.const_data_ptr(), student.stride(0), teacher.stride(0),
          student.size(0),          student.size(1),          type};
}

const uint8_t* mask_of(const optional<Tensor>& mask, const Tensor& student) {
  if (!mask.has_value()) return nullptr;
  check_rows("mask", *mask, at::kBool, {student.size(0)}, student);
  return static_cast<const uint8_t*>(mask->const_data_ptr());
}

float scale_of(double temperature) {
  const auto inverse = static_cast<float>(1 / temperature);
  TORCH_CHECK_VALUE(temperature > 0 && std::isnormal(inverse), "temperature is ", temperature,
                    "; allowed are positive values whose inverse is a normal float");
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
  TORCH_CHECK(false, "this build has no CUDA kernels; build with MEGATRON_GKD_CUDA=1 where torch has CUDA");
#endif
}

#ifdef MEGATRON_GKD_WITH_CUDA
#define GKD_BOTH(name) gkd::cpu::name, gkd::cuda::name
#else
#define GKD_BOTH(name) gkd::cpu::name, nullptr
#endif

Tensor statistics(const Tensor& student, const Tensor& teacher, const optional<Tensor>& mask, double temperature,
                  int64_t first, bool moments, bool untempered) {
  const auto logits = logits_of(student, teacher);
  const auto out =
      at::empty({logits.rows, gkd::statistics_columns(moments, untempered)}, student.options().dtype(at::kFloat));
  const gkd::StatisticsParams params = {logits,  mask_of(mask, student), scale_of(temperature),
                                        untempered ? static_cast<float>(kLog2E) : 0.0f,
                                        moments, first,                  out.mutable_data_ptr<float>()};
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
  const auto logits = logits_of(student, teacher);
  const auto kind = kind_of(divergence);
  TORCH_CHECK_VALUE(kind != gkd::DivergenceKind::forward_kl && kind != gkd::DivergenceKind::reverse_kl, divergence,
                    " has no sums of its own: statistics with moments hold them");
  const auto out = at::empty({logits.rows, 2}, student.options().dtype(at::kFloat));
  const gkd::SumsParams params = {logits, mask_of(mask, student), scale_of(temperature),
                                  normalizers_of(normalizers, student), kind, beta, out.mutable_data_ptr<float>()};
  start(params, student, GKD_BOTH(sums));
  return out;
}

void gradient(Tensor& out, const Tensor& student, const Tensor& teacher, const Tensor& normalizers,
              const Tensor& slope_sum, const Tensor& weight, const optional<Tensor>& untempered,
              const optional<Tensor>& label_weight, const optional<Tensor>& label, const std::string& divergence,
              double beta, double temperature) {
  const auto logits = logits_of(student, teacher);
  TORCH_CHECK_VALUE(out.dim() == 2 && out.size(0) == logits.rows && out.size(1) >= logits.columns &&
                        out.scalar_type() == student.scalar_type() && out.device() == student.device() &&
                        (out.size(1) <= 1 || out.stride(1) == 1),
                    "out is ", out.scalar_type(), " ", out.sizes(), " on ", out.device(), " with strides ",
                    out.strides(), "; it must be ", student.scalar_type(), " of at least ", student.sizes(), " on ",
                    student.device(), ", its rows contiguous");
  check_width("out", out);
  check_rows("slope_sum", slope_sum, at::kFloat, {logits.rows}, student);
  check_rows("weight", weight, at::kFloat, {logits.rows}, student);
  TORCH_CHECK_VALUE(untempered.has_value() == label_weight.has_value() && label.has_value() == label_weight.has_value(),
                    "untempered, label_weight and label must all be given, or none");
  const bool labelled = label_weight.has_value();
  if (labelled) {
    check_rows("untempered", *untempered, at::kFloat, {2, logits.rows}, student);
    check_rows("label_weight", *label_weight, at::kFloat, {logits.rows}, student);
    check_rows("label", *label, at::kLong, {logits.rows}, student);
  }
  const gkd::GradientParams params = {
      logits,
      out.mutable_data_ptr(),
      out.stride(0),
      out.size(1),
      scale_of(temperature),
      static_cast<float>(1 / temperature),
      normalizers_of(normalizers, student),
      slope_sum.const_data_ptr<float>(),
      weight.const_data_ptr<float>(),
      kind_of(divergence),
      beta,
      labelled ? label_weight->const_data_ptr<float>() : nullptr,
      labelled ? untempered->const_data_ptr<float>() : nullptr,
      labelled ? untempered->const_data_ptr<float>() + logits.rows : nullptr,
      labelled ? label->const_data_ptr<int64_t>() : nullptr,
  };
  start(params, student, GKD_BOTH(gradient));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled passes of the vocabulary-parallel divergence; their Python callers are in megatron_gkd.ops.";
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("statistics", &statistics, release);
  m.def("sums", &sums, release);
  m.def("gradient", &gradient, release);
  m.def("cpu_capability", &gkd::cpu::capability, "avx512, avx2 or default");
#ifdef MEGATRON_GKD_WITH_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
}
