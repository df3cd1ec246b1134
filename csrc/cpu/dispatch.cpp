#include <cstdlib>
#include <cstring>

#include "passes.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define GKD_X86 1
#endif

#define GKD_DECLARE(name)                                                      \
  namespace gkd::name {                                                        \
  void statistics(const StatisticsParams& params, int64_t begin, int64_t end); \
  void sums(const SumsParams& params, int64_t begin, int64_t end);             \
  void gradient(const GradientParams& params, int64_t begin, int64_t end);     \
  void softcap(const SoftcapParams& params, int64_t begin, int64_t end);       \
  }
GKD_DECLARE(generic)
#if GKD_X86
GKD_DECLARE(avx2)
GKD_DECLARE(avx512)
#endif

namespace gkd::cpu {
namespace {

struct Kernels {
  const char* name;
  void (*statistics)(const StatisticsParams&, int64_t, int64_t);
  void (*sums)(const SumsParams&, int64_t, int64_t);
  void (*gradient)(const GradientParams&, int64_t, int64_t);
  void (*softcap)(const SoftcapParams&, int64_t, int64_t);
};

const Kernels kDefault = {"default", generic::statistics, generic::sums, generic::gradient, generic::softcap};
#if GKD_X86
const Kernels kAvx2 = {"avx2", avx2::statistics, avx2::sums, avx2::gradient, avx2::softcap};
const Kernels kAvx512 = {"avx512", avx512::statistics, avx512::sums, avx512::gradient, avx512::softcap};
#endif

const Kernels& choose() {
#if GKD_X86
  const char* requested = std::getenv("ATEN_CPU_CAPABILITY");
  const auto allowed = [&](const char* name) { return requested == nullptr || std::strcmp(requested, name) == 0; };
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && allowed("avx512")) return kAvx512;
  if (avx2 && (allowed("avx2") || allowed("avx512"))) return kAvx2;
#endif
  return kDefault;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace

void statistics(const StatisticsParams& params, int64_t begin, int64_t end) {
  kernels().statistics(params, begin, end);
}
void sums(const SumsParams& params, int64_t begin, int64_t end) { kernels().sums(params, begin, end); }
void gradient(const GradientParams& params, int64_t begin, int64_t end) { kernels().gradient(params, begin, end); }
void softcap(const SoftcapParams& params, int64_t begin, int64_t end) { kernels().softcap(params, begin, end); }
const char* capability() { return kernels().name; }

}  // namespace gkd::cpu
