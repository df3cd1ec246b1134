// 2^x, log2 and their relatives near 0 and 1, for one float or for a vector of them.
//
// F is `float` on a GPU and in scalar code, or a GNU vector of floats on a CPU; both have the same operators, and
// comparisons select lanewise. A type's bit operations are in Lanes<F>. A GPU uses its special-function unit.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define GKD_INLINE __host__ __device__ __forceinline__
#else
#define GKD_INLINE inline __attribute__((always_inline))
#endif

namespace gkd {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

template <class F>
struct Lanes;

template <>
struct Lanes<float> {
  using Int = int32_t;
  static GKD_INLINE Int bits(float x) {
#if defined(__CUDA_ARCH__)
    return __float_as_int(x);
#else
    Int i;
    std::memcpy(&i, &x, sizeof i);
    return i;
#endif
  }
  static GKD_INLINE float from_bits(Int i) {
#if defined(__CUDA_ARCH__)
    return __int_as_float(i);
#else
    float x;
    std::memcpy(&x, &i, sizeof x);
    return x;
#endif
  }
  static GKD_INLINE float to_float(Int i) { return static_cast<float>(i); }
};

template <class F>
struct Splat {
  static GKD_INLINE F from(float x) { return F{} + x; }
};

template <>
struct Splat<float> {
  static GKD_INLINE float from(float x) { return x; }  // F{} + x would be an addition, which keeps -0 apart from 0
};

template <class F>
GKD_INLINE F splat(float x) {
  return Splat<F>::from(x);
}

// Whether `fused` rounds once.
template <class F>
struct RoundsOnce {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  static constexpr bool value = true;
#else
  static constexpr bool value = false;
#endif
};

template <>
struct RoundsOnce<float> {
  static constexpr bool value = true;
};

// a b + c, rounded once for a float; for a CPU's vectors where it has an instruction for that.
template <class F>
GKD_INLINE F fused(F a, F b, F c) {
  return a * b + c;
}

GKD_INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

template <class Mask, class F>
GKD_INLINE F pick(Mask mask, F if_true, F otherwise) {
  return mask ? if_true : otherwise;
}

// The larger number; which one is returned beside a NaN is not said.
template <class F>
GKD_INLINE F larger(F x, F y) {
#if defined(__CUDA_ARCH__)
  return fmaxf(x, y);
#else
  return x > y ? x : y;
#endif
}

// min(x, bound); the bound for NaN.
template <class F>
GKD_INLINE F at_most(F x, float bound) {
#if defined(__CUDA_ARCH__)
  return fminf(x, bound);
#else
  return x < bound ? x : splat<F>(bound);
#endif
}

// max(x, floor); NaN stays NaN.
template <class F>
GKD_INLINE F at_least(F x, float floor) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(floor));
  return y;
#else
  return x < floor ? splat<F>(floor) : x;
#endif
}

template <class F>
GKD_INLINE F magnitude(F x) {
#if defined(__CUDA_ARCH__)
  return fabsf(x);
#else
  return Lanes<F>::from_bits(Lanes<F>::bits(x) & 0x7FFFFFFF);
#endif
}

// x / y; on a GPU with an error of two units in the last place.
template <class F>
GKD_INLINE F divide(F x, F y) {
#if defined(__CUDA_ARCH__)
  return __fdividef(x, y);
#else
  return x / y;
#endif
}

// x / y for a y that is neither huge nor tiny, with the same error.
template <class F>
GKD_INLINE F quotient(F x, F y) {
#if defined(__CUDA_ARCH__)
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(y));
  return x * inverse;
#else
  return x / y;
#endif
}

namespace detail {

// x = n + f with n a whole number and |f| <= 1/2; 2^n. For -127 <= x < 128, where 2^-127 becomes 0.
template <class F>
struct Split {
  F f;
  F power;
};

template <class F>
GKD_INLINE Split<F> split(F x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction bits
  const F shifted = x + kRound;
  const F f = x - (shifted - kRound);
  const auto n = Lanes<F>::bits(shifted) - 0x4B400000;
  return {f, Lanes<F>::from_bits((n + 127) << 23)};
}

// (2^f - 1) / f on [-1/2, 1/2], minimax with relative error 1.1e-8.
template <class F>
GKD_INLINE F exp2m1_over_f(F f) {
  F y = f * 1.540351162e-04f + 1.339073547e-03f;
  y = y * f + 9.618237497e-03f;
  y = y * f + 5.550357434e-02f;
  y = y * f + 2.402264979e-01f;
  return y * f + 6.931471879e-01f;
}

// log2(1 + f) / f on [sqrt(1/2) - 1, sqrt(2) - 1], minimax with relative error 2.6e-8.
template <class F>
GKD_INLINE F log2_1p_over_f(F f) {
  F y = f * 1.258366291e-01f - 2.072695556e-01f;
  y = y * f + 2.157156627e-01f;
  y = y * f - 2.389448521e-01f;
  y = y * f + 2.879162456e-01f;
  y = y * f - 3.607036814e-01f;
  y = y * f + 4.809106430e-01f;
  y = y * f - 7.213473468e-01f;
  return y * f + 1.442695004e+00f;
}

template <class F>
GKD_INLINE F log2_polynomial(F x) {
  constexpr int32_t kSqrtHalf = 0x3F3504F3;
  const auto bits = Lanes<F>::bits(x) - kSqrtHalf;
  const F f = Lanes<F>::from_bits((bits & 0x007FFFFF) + kSqrtHalf) - 1.0f;
  return Lanes<F>::to_float(bits >> 23) + f * log2_1p_over_f(f);
}

}  // namespace detail

// 2^x for x < 128; 0 below about -126.5, NaN for NaN.
template <class F>
GKD_INLINE F exp2(F x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const auto s = detail::split(at_least(x, -127.0f));
  return s.power * (1.0f + s.f * detail::exp2m1_over_f(s.f));
#endif
}

// The same; a type of floats may have two ways to compute it, and `kPolynomial` chooses one.
template <bool kPolynomial, class F>
GKD_INLINE F exp2_either(F x) {
  return exp2(x);
}

// 2^x for -127 <= x < 128 with an error of about one unit in the last place, and exactly 1 for 0. A GPU's own is four
// times less exact.
template <class F>
GKD_INLINE F exact_exp2(F x) {
  const auto s = detail::split(x);
  return s.power * (1.0f + s.f * detail::exp2m1_over_f(s.f));
}

// log2 of a positive normal number; exactly 0 for 1.
template <class F>
GKD_INLINE F log2(F x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return detail::log2_polynomial(x);
#endif
}

// log2 of the higher and of the lower of two positive numbers over a mixture of them: >= 0 and <= 0.
template <class F>
struct LogShares {
  F higher;
  F lower;
};

// A logarithm near 1 and an exponential near 0, with a relative error of about 1e-7.
struct Accurate {
  template <class F>
  static GKD_INLINE F exp2m1(F x) {
    const auto s = detail::split(at_least(x, -127.0f));
    return s.power * (s.f * detail::exp2m1_over_f(s.f)) + (s.power - 1.0f);
  }

  // The logarithm is taken of 1 + y, for the small y by which the mixture exceeds 1 or, relatively, e. What 1 + y has
  // lost of y's digits is added again. Where the mixture is near neither, it is summed as it stands.
  template <class F>
  static GKD_INLINE LogShares<F> log2_shares(F w, F rest, F e, F gap) {
    const auto near_lower = w * e > rest;
    const F y = near_lower ? rest * divide(1.0f - e, e) : w * (e - 1.0f);
    const auto is_far = y < -0.5f;
    const F x = is_far ? w * e + rest : 1.0f + y;
    const F lost = is_far ? splat<F>(0.0f) : y - (x - 1.0f);
    const F log = detail::log2_polynomial(x) + divide(lost, x) * kLog2E;
    return {near_lower ? -log - gap : -log, near_lower ? -log : gap - log};
  }
};

}  // namespace gkd
