// The CPU kernels for the compiler's default target.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#define GKD_CPU_NAMESPACE generic
#define GKD_CPU_LANES 4
#include "kernels.h"
