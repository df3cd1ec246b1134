// The passes over a top-k for AVX2. Standard headers come first, so that none of their functions is compiled for it.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <type_traits>
#include <vector>
#pragma GCC target("avx2,fma")
#define GKD_CPU_NAMESPACE avx2
#define GKD_CPU_LANES 8
#include "top_k_kernels.h"
#endif
