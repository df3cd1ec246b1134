// A register of floats at a time, loaded from and stored to each float type. GNU vectors of GKD_CPU_LANES floats; this
// file is compiled once per instruction set, each time into a namespace of its own.

#pragma once

#include <cstring>
#include <type_traits>

#include "../params.h"
#include "../vector_math.h"

namespace gkd::GKD_CPU_NAMESPACE {

constexpr int kLanes = GKD_CPU_LANES;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

}  // namespace gkd::GKD_CPU_NAMESPACE

namespace gkd {

template <>
struct Lanes<GKD_CPU_NAMESPACE::Floats> {
  using Floats = GKD_CPU_NAMESPACE::Floats;
  using Int = GKD_CPU_NAMESPACE::Ints;
  static GKD_INLINE Int bits(Floats x) { return (Int)x; }
  static GKD_INLINE Floats from_bits(Int i) { return (Floats)i; }
  static GKD_INLINE Floats to_float(Int i) { return __builtin_convertvector(i, Floats); }
};

}  // namespace gkd

namespace gkd::GKD_CPU_NAMESPACE {

// What memory holds of a float type, and the way to float and back (to the nearest, ties to even).
template <FloatType>
struct Storage;

template <>
struct Storage<FloatType::f32> {
  using Element = float;
  using Elements = Floats;
  static GKD_INLINE Floats widen(Floats x) { return x; }
  static GKD_INLINE Floats narrow(Floats x) { return x; }
  static constexpr float kMinusInfinity = -__builtin_inff();
};

template <>
struct Storage<FloatType::bf16> {
  using Element = uint16_t;
  using Elements = Halves;
  static GKD_INLINE Floats widen(Halves x) { return (Floats)(__builtin_convertvector(x, Words) << 16); }
  static GKD_INLINE Halves narrow(Floats x) {
    const Words bits = (Words)x;
    const Words rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const Words nan = Words{} + 0x7FC0u;
    return __builtin_convertvector((x == x) ? rounded : nan, Halves);
  }
  static constexpr uint16_t kMinusInfinity = 0xFF80;
};

template <>
struct Storage<FloatType::f16> {
  using Element = uint16_t;
  using Elements = Halves;
  static GKD_INLINE Floats widen(Halves x) {
    const Words half = __builtin_convertvector(x, Words);
    const Words magnitude = (half & 0x7FFFu) << 13;
    // Put the exponent right by a multiplication, which also serves subnormals; infinity and NaN keep the largest.
    const Floats finite = (Floats)magnitude * 0x1p112f;
    const Words bits = (magnitude >= (0x7C00u << 13)) ? (magnitude | 0x7F800000u) : (Words)finite;
    return (Floats)(bits | ((half & 0x8000u) << 16));
  }
  static GKD_INLINE Halves narrow(Floats x) {
    const Words bits = (Words)x;
    const Words sign = (bits >> 16) & 0x8000u;
    const Words magnitude = bits & 0x7FFFFFFFu;
    // Below 2^-14 the spacing is that of the floats around 1/2: adding 1/2 rounds.
    const Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3F000000u;
    const Words normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    Words half = (magnitude < 0x38800000u) ? subnormal : normal;
    half = (magnitude >= 0x477FF000u) ? Words{} + 0x7C00u : half;  // 65520 and more
    half = (magnitude > 0x7F800000u) ? Words{} + 0x7E00u : half;
    return __builtin_convertvector(half | sign, Halves);
  }
  static constexpr uint16_t kMinusInfinity = 0xFC00;
};

template <FloatType type>
GKD_INLINE Floats load(const typename Storage<type>::Element* from) {
  typename Storage<type>::Elements x;
  std::memcpy(&x, from, sizeof x);
  return Storage<type>::widen(x);
}

// The first `count` lanes, and -inf for the others.
template <FloatType type>
GKD_INLINE Floats load_some(const typename Storage<type>::Element* from, int64_t count) {
  typename Storage<type>::Element buffer[kLanes];
  for (int i = 0; i < kLanes; ++i) buffer[i] = i < count ? from[i] : Storage<type>::kMinusInfinity;
  return load<type>(buffer);
}

template <FloatType type>
GKD_INLINE float load_one(const typename Storage<type>::Element* from) {
  return load_some<type>(from, 1)[0];
}

template <FloatType type>
GKD_INLINE void store(typename Storage<type>::Element* to, Floats x) {
  const typename Storage<type>::Elements narrow = Storage<type>::narrow(x);
  std::memcpy(to, &narrow, sizeof narrow);
}

template <FloatType type>
GKD_INLINE void store_some(typename Storage<type>::Element* to, Floats x, int64_t count) {
  const typename Storage<type>::Elements narrow = Storage<type>::narrow(x);
  std::memcpy(to, &narrow, count * sizeof(typename Storage<type>::Element));
}

GKD_INLINE float sum(Floats x) {
  float lanes[kLanes];
  std::memcpy(lanes, &x, sizeof lanes);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

GKD_INLINE float maximum(Floats x) {
  float largest = x[0];
  for (int i = 1; i < kLanes; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

// body(offset, count) over a row, in steps of a vector; `count` is a constant in all steps but the last.
template <class Body>
GKD_INLINE void for_each_vector(int64_t begin, int64_t end, const Body& body) {
  int64_t j = begin;
  for (; j + kLanes <= end; j += kLanes) body(j, std::integral_constant<int64_t, kLanes>());
  if (j < end) body(j, end - j);
}

template <FloatType type, class Count>
GKD_INLINE Floats load_count(const typename Storage<type>::Element* from, Count count) {
  if constexpr (std::is_same_v<Count, int64_t>) {
    return load_some<type>(from, count);
  } else {
    return load<type>(from);
  }
}

}  // namespace gkd::GKD_CPU_NAMESPACE
