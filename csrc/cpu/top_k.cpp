#include "top_k.h"

#include <cstring>

#include "passes.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define GKD_X86 1
#endif

#define GKD_DECLARE(name)                                                                \
  namespace gkd::name {                                                                  \
  void top_k_select(const TopKSelectParams& params, int64_t begin, int64_t end);         \
  void top_k_statistics(const TopKStatisticsParams& params, int64_t begin, int64_t end); \
  void top_k_gradient(const TopKGradientParams& params, int64_t begin, int64_t end);     \
  }
GKD_DECLARE(generic)
#if GKD_X86
GKD_DECLARE(avx2)
GKD_DECLARE(avx512)
#endif

namespace gkd::generic {  // a few numbers a row: no instruction set makes a difference
void top_k_merge(const TopKMergeParams& params, int64_t begin, int64_t end);
void top_k_sums(const TopKSumsParams& params, int64_t begin, int64_t end);
void top_k_combine(const TopKCombineParams& params, int64_t begin, int64_t end);
}  // namespace gkd::generic

namespace gkd::cpu {
namespace {

struct Kernels {
  void (*select)(const TopKSelectParams&, int64_t, int64_t);
  void (*statistics)(const TopKStatisticsParams&, int64_t, int64_t);
  void (*gradient)(const TopKGradientParams&, int64_t, int64_t);
};

Kernels choose() {
#if GKD_X86
  if (std::strcmp(capability(), "avx512") == 0) {
    return {avx512::top_k_select, avx512::top_k_statistics, avx512::top_k_gradient};
  }
  if (std::strcmp(capability(), "avx2") == 0) return {avx2::top_k_select, avx2::top_k_statistics, avx2::top_k_gradient};
#endif
  return {generic::top_k_select, generic::top_k_statistics, generic::top_k_gradient};
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace

void top_k_select(const TopKSelectParams& params, int64_t begin, int64_t end) { kernels().select(params, begin, end); }
void top_k_merge(const TopKMergeParams& params, int64_t begin, int64_t end) {
  generic::top_k_merge(params, begin, end);
}
void top_k_statistics(const TopKStatisticsParams& params, int64_t begin, int64_t end) {
  kernels().statistics(params, begin, end);
}
void top_k_sums(const TopKSumsParams& params, int64_t begin, int64_t end) { generic::top_k_sums(params, begin, end); }
void top_k_combine(const TopKCombineParams& params, int64_t begin, int64_t end) {
  generic::top_k_combine(params, begin, end);
}
void top_k_gradient(const TopKGradientParams& params, int64_t begin, int64_t end) {
  kernels().gradient(params, begin, end);
}

}  // namespace gkd::cpu
