// A stand-in for CUDA's header: see cuda_runtime.h.

#pragma once

#include "cuda_runtime.h"

struct __half2 {
  uint16_t x, y;
};

namespace cuda_emulator {

inline float from_fp16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float magnitude = std::ldexp(float(fraction + 1024), exponent - 25);
  if (exponent == 0) magnitude = std::ldexp(float(fraction), -24);
  if (exponent == 31) magnitude = fraction != 0 ? NAN : INFINITY;
  return bits >> 15 != 0 ? -magnitude : magnitude;
}

inline uint16_t to_fp16(float x) {
  if (std::isnan(x)) return 0x7FFF;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return sign | 0x7C00;
  if (magnitude == 0) return sign;
  const int exponent = std::max(std::ilogb(magnitude), -14);
  // In units of the last place, 1024 to 2048 for normal numbers; rounding up to 2048 carries into the exponent.
  const int units = int(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return uint16_t(sign | (((exponent + 14) << 10) + units));
}

// The larger one; a NaN loses against a number.
inline uint16_t larger_fp16(uint16_t a, uint16_t b) { return to_fp16(std::fmax(from_fp16(a), from_fp16(b))); }

}  // namespace cuda_emulator

inline __half2 __hmax2(__half2 a, __half2 b) {
  return {cuda_emulator::larger_fp16(a.x, b.x), cuda_emulator::larger_fp16(a.y, b.y)};
}
inline __half2 __floats2half2_rn(float x, float y) { return {cuda_emulator::to_fp16(x), cuda_emulator::to_fp16(y)}; }
inline float2 __half22float2(__half2 two) { return {cuda_emulator::from_fp16(two.x), cuda_emulator::from_fp16(two.y)}; }
