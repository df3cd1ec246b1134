// Two floats that are computed on side by side: on sm_100 by instructions for two at once, elsewhere one by one.
//
// The functions are those of vector_math.h. Where an instruction takes two floats, the unit for powers of two is what
// limits a loop, so `exp2_either<true>` computes them by a polynomial.

#pragma once

#include <cuda_runtime.h>

#include "../vector_math.h"

namespace gkd {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define GKD_PAIRED 1
#else
#define GKD_PAIRED 0
#endif

struct Two {
  float2 of;

  struct Mask {
    bool x, y;
  };
};

template <>
struct Splat<Two> {
  static __device__ __forceinline__ Two from(float x) { return {{x, x}}; }
};

template <>
struct RoundsOnce<Two> {
  static constexpr bool value = true;
};

#if GKD_PAIRED
__device__ __forceinline__ Two operator+(Two a, Two b) { return {__fadd2_rn(a.of, b.of)}; }
__device__ __forceinline__ Two operator*(Two a, Two b) { return {__fmul2_rn(a.of, b.of)}; }
__device__ __forceinline__ Two fused(Two a, Two b, Two c) { return {__ffma2_rn(a.of, b.of, c.of)}; }
#else
__device__ __forceinline__ Two operator+(Two a, Two b) { return {{a.of.x + b.of.x, a.of.y + b.of.y}}; }
__device__ __forceinline__ Two operator*(Two a, Two b) { return {{a.of.x * b.of.x, a.of.y * b.of.y}}; }
__device__ __forceinline__ Two fused(Two a, Two b, Two c) {
  return {{fused(a.of.x, b.of.x, c.of.x), fused(a.of.y, b.of.y, c.of.y)}};
}
#endif
__device__ __forceinline__ Two operator-(Two a) { return {{-a.of.x, -a.of.y}}; }
__device__ __forceinline__ Two operator-(Two a, Two b) { return a + -b; }
__device__ __forceinline__ Two::Mask operator<(Two a, Two b) { return {a.of.x < b.of.x, a.of.y < b.of.y}; }
__device__ __forceinline__ Two pick(Two::Mask mask, Two if_true, Two otherwise) {
  return {{mask.x ? if_true.of.x : otherwise.of.x, mask.y ? if_true.of.y : otherwise.of.y}};
}
__device__ __forceinline__ Two magnitude(Two a) { return {{magnitude(a.of.x), magnitude(a.of.y)}}; }
__device__ __forceinline__ Two larger(Two a, Two b) { return {{larger(a.of.x, b.of.x), larger(a.of.y, b.of.y)}}; }
__device__ __forceinline__ Two at_most(Two a, float bound) {
  return {{at_most(a.of.x, bound), at_most(a.of.y, bound)}};
}
__device__ __forceinline__ Two at_least(Two a, float floor) {
  return {{at_least(a.of.x, floor), at_least(a.of.y, floor)}};
}
__device__ __forceinline__ Two quotient(Two a, Two b) { return {{quotient(a.of.x, b.of.x), quotient(a.of.y, b.of.y)}}; }
__device__ __forceinline__ Two exp2(Two a) { return {{exp2(a.of.x), exp2(a.of.y)}}; }
__device__ __forceinline__ Two log2(Two a) { return {{log2(a.of.x), log2(a.of.y)}}; }

// 2^x with a relative error of 3e-6, for x <= 0; the method is Cody and Waite's, a power of two times a polynomial.
__device__ __forceinline__ Two exp2_by_polynomial(Two x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction bits
  const Two bounded = at_least(x, -127.0f);
  const Two shifted = bounded + splat<Two>(kRound);
  const Two f = bounded - (shifted + splat<Two>(-kRound));
  Two y = fused(f, splat<Two>(9.582853e-03f), splat<Two>(5.5906426e-02f));
  y = fused(y, f, splat<Two>(2.4024099e-01f));
  y = fused(y, f, splat<Two>(6.931242e-01f));
  y = fused(y, f, splat<Two>(1.0f));
  // The lowest bits of `shifted` are the whole number: moved to the place of the exponent, they are added to it.
  const auto scale = [](float shifted) { return __uint_as_float((__float_as_uint(shifted) << 23) + 0x3F800000u); };
  return y * Two{{scale(shifted.of.x), scale(shifted.of.y)}};
}

template <bool kPolynomial>
__device__ __forceinline__ Two exp2_either(Two x) {
  if constexpr (kPolynomial && GKD_PAIRED) return exp2_by_polynomial(x);
  return exp2(x);
}

}  // namespace gkd
