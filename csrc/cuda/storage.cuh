// Sixteen bytes of logits, and the way to float and back (to the nearest, ties to even).

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../params.h"
#include "two.cuh"

namespace gkd::cuda {

// What one 16-byte load brings: the bits of 4 or 8 logits, lower columns in lower bits of lower words.
struct Pack {
  uint32_t word[4];
};

namespace detail {

template <class To, class From>
__device__ __forceinline__ To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// The two larger halves of four pairs; NaN loses against a number.
template <class Two>
__device__ __forceinline__ Two maximum(const Pack& pack) {
  const Two a = bit_cast<Two>(pack.word[0]), b = bit_cast<Two>(pack.word[1]);
  const Two c = bit_cast<Two>(pack.word[2]), d = bit_cast<Two>(pack.word[3]);
  return __hmax2(__hmax2(a, b), __hmax2(c, d));
}

}  // namespace detail

// Bits of one logit are an `Element`. `maximum` is that of a pack's numbers: NaN only if it holds nothing else.
template <FloatType>
struct Storage;

template <>
struct Storage<FloatType::f32> {
  using Element = uint32_t;
  static constexpr int kPerWord = 1;
  static constexpr Element kMinusInfinity = 0xFF800000u;

  static __device__ __forceinline__ void widen(uint32_t word, float (&z)[1]) { z[0] = __uint_as_float(word); }
  static __device__ __forceinline__ uint32_t narrow(const float (&z)[1]) { return __float_as_uint(z[0]); }
  static __device__ __forceinline__ float maximum(const Pack& pack) {
    return fmaxf(fmaxf(__uint_as_float(pack.word[0]), __uint_as_float(pack.word[1])),
                 fmaxf(__uint_as_float(pack.word[2]), __uint_as_float(pack.word[3])));
  }
};

template <>
struct Storage<FloatType::bf16> {
  using Element = uint16_t;
  static constexpr int kPerWord = 2;
  static constexpr Element kMinusInfinity = 0xFF80;

  static __device__ __forceinline__ void widen(uint32_t word, float (&z)[2]) {
    z[0] = __uint_as_float(word << 16);
    z[1] = __uint_as_float(word & 0xFFFF0000u);
  }
  static __device__ __forceinline__ uint32_t narrow(const float (&z)[2]) {
    return detail::bit_cast<uint32_t>(__floats2bfloat162_rn(z[0], z[1]));
  }
  static __device__ __forceinline__ float maximum(const Pack& pack) {
    const float2 two = __bfloat1622float2(detail::maximum<__nv_bfloat162>(pack));
    return fmaxf(two.x, two.y);
  }
};

template <>
struct Storage<FloatType::f16> {
  using Element = uint16_t;
  static constexpr int kPerWord = 2;
  static constexpr Element kMinusInfinity = 0xFC00;

  static __device__ __forceinline__ void widen(uint32_t word, float (&z)[2]) {
    const float2 two = __half22float2(detail::bit_cast<__half2>(word));
    z[0] = two.x;
    z[1] = two.y;
  }
  static __device__ __forceinline__ uint32_t narrow(const float (&z)[2]) {
    return detail::bit_cast<uint32_t>(__floats2half2_rn(z[0], z[1]));
  }
  static __device__ __forceinline__ float maximum(const Pack& pack) {
    const float2 two = __half22float2(detail::maximum<__half2>(pack));
    return fmaxf(two.x, two.y);
  }
};

constexpr int kWords = 4;

// What a form computes on: 16-bit logits two by two.
template <FloatType type, class Form>
using Lane = std::conditional_t<Form::kFast, Two, float>;

__device__ __forceinline__ float total(float x) { return x; }
__device__ __forceinline__ float total(Two x) { return x.of.x + x.of.y; }

// A word's logits as floats, one by one or two side by side, and back.
template <FloatType type, class F>
struct Word {
  static constexpr int kLanes = Storage<type>::kPerWord;
  static __device__ __forceinline__ void widen(uint32_t word, float (&z)[kLanes]) { Storage<type>::widen(word, z); }
  static __device__ __forceinline__ uint32_t narrow(const float (&z)[kLanes]) { return Storage<type>::narrow(z); }
};

template <FloatType type>
struct Word<type, Two> {
  static constexpr int kLanes = 1;
  static __device__ __forceinline__ void widen(uint32_t word, Two (&z)[1]) {
    float of_word[2];
    Storage<type>::widen(word, of_word);
    z[0] = {{of_word[0], of_word[1]}};
  }
  static __device__ __forceinline__ uint32_t narrow(const Two (&z)[1]) {
    const float of_word[2] = {z[0].of.x, z[0].of.y};
    return Storage<type>::narrow(of_word);
  }
};

// A pack as floats, and back.
template <FloatType type>
__device__ __forceinline__ void widen(const Pack& pack, float (&z)[kWords * Storage<type>::kPerWord]) {
  constexpr int kPerWord = Storage<type>::kPerWord;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    float of_word[kPerWord];
    Storage<type>::widen(pack.word[i], of_word);
#pragma unroll
    for (int k = 0; k < kPerWord; ++k) z[i * kPerWord + k] = of_word[k];
  }
}

template <FloatType type>
__device__ __forceinline__ Pack narrow(const float (&z)[kWords * Storage<type>::kPerWord]) {
  constexpr int kPerWord = Storage<type>::kPerWord;
  Pack pack;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    float of_word[kPerWord];
#pragma unroll
    for (int k = 0; k < kPerWord; ++k) of_word[k] = z[i * kPerWord + k];
    pack.word[i] = Storage<type>::narrow(of_word);
  }
  return pack;
}

}  // namespace gkd::cuda
