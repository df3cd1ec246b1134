// The passes over a top-k for the compiler's default target.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <type_traits>
#include <vector>
#define GKD_CPU_NAMESPACE generic
#define GKD_CPU_LANES 4
#include "top_k_kernels.h"
#include "top_k_small.h"
