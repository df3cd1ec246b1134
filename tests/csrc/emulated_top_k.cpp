// The passes over a top-k that the tests call, on the emulated GPU or the CPU. Each returns an error's text, or null.

#include <cuda_runtime.h>

#include <string>

#include "../../csrc/cuda/top_k.h"

namespace gkd::generic {
void top_k_select(const TopKSelectParams& params, int64_t begin, int64_t end);
void top_k_merge(const TopKMergeParams& params, int64_t begin, int64_t end);
void top_k_statistics(const TopKStatisticsParams& params, int64_t begin, int64_t end);
void top_k_sums(const TopKSumsParams& params, int64_t begin, int64_t end);
void top_k_combine(const TopKCombineParams& params, int64_t begin, int64_t end);
void top_k_gradient(const TopKGradientParams& params, int64_t begin, int64_t end);
}  // namespace gkd::generic

namespace {

template <class Params>
const char* run(bool on_gpu, const Params& params, int64_t rows, void (*cuda)(const Params&, void*),
                void (*cpu)(const Params&, int64_t, int64_t)) {
  static std::string error;
  try {
    on_gpu ? cuda(params, nullptr) : cpu(params, 0, rows);
    return nullptr;
  } catch (const std::exception& exception) {
    error = exception.what();
    return error.c_str();
  }
}

}  // namespace

extern "C" {

// A tensor of logits, as the tests pass it.
struct Matrix {
  void* data;
  int64_t stride, rows, columns;
  int type;
};

struct Tokens {
  const int64_t* ids;
  const float* values;
  const float* tail;
  int64_t k, first, vocabulary;
};

struct Loss {
  int kind;
  double beta, temperature;
};

static gkd::Logits logits_of(const Matrix& m) {
  return {m.data, nullptr, m.stride, 0, m.rows, m.columns, gkd::FloatType(m.type), false};
}

static gkd::TopKTokens tokens_of(const Tokens& t) { return {t.ids, t.values, t.tail, t.k, t.first, t.vocabulary}; }

static float scale_of(double temperature) { return temperature == 0 ? 0 : float(1.4426950408889634 / temperature); }

void reverse_threads(bool reverse) { cuda_emulator::reverse_order = reverse; }

const char* top_k_select(bool on_gpu, const Matrix* logits, int64_t k, double temperature, int64_t first,
                         int32_t* out) {
  const gkd::TopKSelectParams params = {logits_of(*logits), k, scale_of(temperature), first, out};
  return run(on_gpu, params, logits->rows, gkd::cuda::top_k_select, gkd::generic::top_k_select);
}

const char* top_k_merge(bool on_gpu, const int32_t* gathered, int64_t ranks, int64_t rows, int64_t places, int64_t k,
                        double temperature, int64_t* ids, float* values, float* tail) {
  const gkd::TopKMergeParams params = {gathered, ranks, rows, places, k, 1 / temperature, ids, values, tail};
  return run(on_gpu, params, rows, gkd::cuda::top_k_merge, gkd::generic::top_k_merge);
}

const char* top_k_statistics(bool on_gpu, const Matrix* logits, const Tokens* tokens, int columns, double temperature,
                             const int64_t* labels, float* out) {
  const gkd::TopKStatisticsParams params = {
      logits_of(*logits), tokens_of(*tokens), scale_of(temperature), 1 / temperature, columns, labels, out};
  return run(on_gpu, params, logits->rows, gkd::cuda::top_k_statistics, gkd::generic::top_k_statistics);
}

const char* top_k_sums(bool on_gpu, const Matrix* logits, const Tokens* tokens, const Loss* loss, const float* gathered,
                       int64_t ranks, int columns, const int64_t* labels, float* normalizers, float* out,
                       float* cross_entropy) {
  const gkd::TopKSumsParams params = {logits_of(*logits),
                                      tokens_of(*tokens),
                                      gathered,
                                      ranks,
                                      columns,
                                      1 / loss->temperature,
                                      gkd::DivergenceKind(loss->kind),
                                      loss->beta,
                                      labels,
                                      reinterpret_cast<gkd::TopKNormalizers*>(normalizers),
                                      out,
                                      cross_entropy};
  return run(on_gpu, params, logits->rows, gkd::cuda::top_k_sums, gkd::generic::top_k_sums);
}

const char* top_k_combine(bool on_gpu, const float* gathered, int64_t ranks, int64_t rows, const float* cross_entropy,
                          const float* token_weights, const int64_t* labels, const float* label_weights, float factor,
                          float* metrics, float* losses, float* slope_sum, float* weight, float* label_weight) {
  const gkd::TopKCombineParams params = {gathered, ranks,         rows,   cross_entropy, token_weights,
                                         labels,   label_weights, factor, metrics,       gkd::kTopKSums,
                                         losses,   slope_sum,     weight, label_weight};
  return run(on_gpu, params, rows, gkd::cuda::top_k_combine, gkd::generic::top_k_combine);
}

const char* top_k_gradient(bool on_gpu, const Matrix* logits, const Tokens* tokens, const Loss* loss, const Matrix* out,
                           const float* normalizers, const float* slope_sum, int64_t slope_sum_stride,
                           const float* weight, const float* label_weight, const int64_t* labels, float softcap,
                           float* others, float* at_tokens) {
  const gkd::TopKGradientParams params = {logits_of(*logits),
                                          tokens_of(*tokens),
                                          out->data,
                                          out->stride,
                                          out->columns,
                                          scale_of(loss->temperature),
                                          1 / loss->temperature,
                                          gkd::DivergenceKind(loss->kind),
                                          loss->beta,
                                          reinterpret_cast<const gkd::TopKNormalizers*>(normalizers),
                                          slope_sum,
                                          slope_sum_stride,
                                          weight,
                                          label_weight,
                                          labels,
                                          softcap == 0 ? 0 : 1 / softcap,
                                          reinterpret_cast<gkd::TopKOthers*>(others),
                                          at_tokens};
  return run(on_gpu, params, logits->rows, gkd::cuda::top_k_gradient, gkd::generic::top_k_gradient);
}
}
