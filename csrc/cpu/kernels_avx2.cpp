// The CPU kernels for AVX2. Standard headers come first, so that none of their functions is compiled for it.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#pragma GCC target("avx2,fma")
#define GKD_CPU_NAMESPACE avx2
#define GKD_CPU_LANES 8
#include "kernels.h"
#endif
