// Replaces CUDA's header; see cuda_runtime.h.

#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat162 {
  uint16_t x, y;
};

namespace cuda_emulator {

inline float from_bf16(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }

inline uint16_t to_bf16(float x) {
  if (std::isnan(x)) return 0x7FFF;
  const uint32_t bits = __float_as_uint(x), low = bits & 0xFFFFu;
  uint32_t high = bits >> 16;
  if (low > 0x8000u || (low == 0x8000u && high % 2 == 1)) ++high;
  return uint16_t(high);
}

// The larger one; a NaN loses against a number.
inline uint16_t larger_bf16(uint16_t a, uint16_t b) { return to_bf16(std::fmax(from_bf16(a), from_bf16(b))); }

}  // namespace cuda_emulator

inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {cuda_emulator::larger_bf16(a.x, b.x), cuda_emulator::larger_bf16(a.y, b.y)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {cuda_emulator::to_bf16(x), cuda_emulator::to_bf16(y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 two) {
  return {cuda_emulator::from_bf16(two.x), cuda_emulator::from_bf16(two.y)};
}
