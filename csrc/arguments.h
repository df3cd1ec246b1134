// Checks of what Python passes, and the start of a kernel: for the files that define the module's functions.

#pragma once

#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <cmath>
#include <map>
#include <string>

#include "params.h"

#ifdef MEGATRON_GKD_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace gkd::arguments {

using at::Tensor;
using std::optional;

constexpr double kExactLog2E = 1.4426950408889634074;

inline gkd::DivergenceKind kind_of(const std::string& name) {
#define GKD_NAMED_KIND(name, ...) {#name, gkd::DivergenceKind::name},
  static const std::map<std::string, gkd::DivergenceKind> kinds = {GKD_DIVERGENCES(GKD_NAMED_KIND)};
#undef GKD_NAMED_KIND
  const auto found = kinds.find(name);
  TORCH_CHECK_VALUE(found != kinds.end(), "divergence = ", name, ": unknown; GKD_DIVERGENCES lists all");
  return found->second;
}

inline gkd::FloatType float_type(const Tensor& logits) {
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

inline void check_logits(const char* name, const Tensor& x, const Tensor& like) {
  TORCH_CHECK_VALUE(
      x.dim() == 2 && x.sizes() == like.sizes() && x.scalar_type() == like.scalar_type() && x.device() == like.device(),
      name, " = ", x.scalar_type(), " ", x.sizes(), " on ", x.device(), ": must be ", like.scalar_type(), " ",
      like.sizes(), " on ", like.device(), ", rows by columns");
  TORCH_CHECK_VALUE(x.size(1) <= 1 || x.stride(1) == 1, name, " = strides ", x.strides(), ": rows must be contiguous");
}

// A contiguous tensor of one row of numbers for each row of logits.
inline void check_rows(const char* name, const Tensor& x, at::ScalarType type, at::IntArrayRef sizes,
                       const Tensor& logits) {
  TORCH_CHECK_VALUE(x.sizes() == sizes && x.scalar_type() == type && x.device() == logits.device() && x.is_contiguous(),
                    name, " = ", x.scalar_type(), " ", x.sizes(), " on ", x.device(), ": must be a contiguous ", type,
                    " ", sizes, " on ", logits.device());
}

// Within a row, GPU kernels count columns in 32 bits.
inline void check_width(const char* name, const Tensor& x) {
  constexpr int64_t kMost = (int64_t{1} << 31) - (int64_t{1} << 16);
  TORCH_CHECK_VALUE(x.is_cpu() || x.size(1) <= kMost, name, " = ", x.size(1), " columns: must be at most ", kMost);
}

// `teacher` is null for a pass that reads the student only.
inline gkd::Logits logits_of(const Tensor& student, const Tensor* teacher) {
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

inline const uint8_t* mask_of(const optional<Tensor>& mask, const Tensor& student) {
  if (!mask.has_value()) return nullptr;
  check_rows("mask", *mask, at::kBool, {student.size(0)}, student);
  return static_cast<const uint8_t*>(mask->const_data_ptr());
}

inline float scale_of(double temperature) {
  const auto inverse = static_cast<float>(1 / temperature);
  TORCH_CHECK_VALUE(temperature > 0 && std::isnormal(inverse), "temperature = ", temperature,
                    ": must be positive, with an inverse that is a normal float");
  return static_cast<float>(kExactLog2E / temperature);
}

// On the device of `like`. `elements` of a row are read, of which enough for a thread make a task.
template <class Params, class CpuKernel, class CudaKernel>
void start_rows(const Params& params, int64_t rows, int64_t elements, const Tensor& like, CpuKernel cpu,
                [[maybe_unused]] CudaKernel cuda) {
  if (rows == 0) return;
  if (like.is_cpu()) {
    const auto grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements));
    at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { cpu(params, begin, end); });
    return;
  }
#ifdef MEGATRON_GKD_WITH_CUDA
  const c10::cuda::CUDAGuard guard(like.device());
  cuda(params, c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
#else
  TORCH_CHECK(false, "logits on ", like.device(),
              ": this build has no CUDA kernels; build with MEGATRON_GKD_CUDA=1 where torch has CUDA");
#endif
}

template <class Params, class CpuKernel, class CudaKernel>
void start(const Params& params, const Tensor& student, CpuKernel cpu, CudaKernel cuda) {
  start_rows(params, params.logits.rows, params.logits.columns, student, cpu, cuda);
}

#ifdef MEGATRON_GKD_WITH_CUDA
#define GKD_BOTH(name) gkd::cpu::name, gkd::cuda::name
#else
#define GKD_BOTH(name) gkd::cpu::name, nullptr
#endif

inline void check_out(const Tensor& out, const gkd::Logits& logits, const Tensor& student) {
  TORCH_CHECK_VALUE(out.dim() == 2 && out.size(0) == logits.rows && out.size(1) >= logits.columns &&
                        out.scalar_type() == student.scalar_type() && out.device() == student.device() &&
                        (out.size(1) <= 1 || out.stride(1) == 1),
                    "out = ", out.scalar_type(), " ", out.sizes(), " on ", out.device(), " with strides ",
                    out.strides(), ": must be ", student.scalar_type(), " of at least ", student.sizes(), " on ",
                    student.device(), ", with contiguous rows");
  check_width("out", out);
}

inline float cap_of(double softcap) {
  const auto cap = static_cast<float>(softcap), inverse = static_cast<float>(1 / softcap);
  TORCH_CHECK_VALUE(cap > 0 && std::isnormal(cap) && std::isnormal(inverse), "softcap = ", softcap,
                    ": must be a positive normal float, and so must its inverse");
  return cap;
}

}  // namespace gkd::arguments
