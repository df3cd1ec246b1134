// From values known at run time to template arguments: each switch runs its body with a name bound to a constant or a
// type.

#pragma once

#include <type_traits>

#include "divergences.h"
#include "params.h"

namespace gkd {

// `Fast` has an absolute error of about 1e-7. Near beta = 0 and 1, terms are proportional to min(beta, 1 - beta), so that
// error divided by this threshold, 1e-5, stays below the rounding of 16-bit logits.
constexpr double kFastMinimumWeight = 1e-2;

// The formulas for logits of a type where beta is not near 0 or 1.
template <FloatType type>
using MathOf = std::conditional_t<type == FloatType::f32, Accurate, Fast>;

}  // namespace gkd

#define GKD_BOOL_SWITCH(condition, Name, ...) \
  [&] {                                       \
    if (condition) {                          \
      constexpr bool Name = true;             \
      return __VA_ARGS__();                   \
    }                                         \
    constexpr bool Name = false;              \
    return __VA_ARGS__();                     \
  }()

#define GKD_TYPE_SWITCH(type, ...)                   \
  [&] {                                              \
    switch (type) {                                  \
      case FloatType::bf16: {                        \
        constexpr FloatType kType = FloatType::bf16; \
        return __VA_ARGS__();                        \
      }                                              \
      case FloatType::f16: {                         \
        constexpr FloatType kType = FloatType::f16;  \
        return __VA_ARGS__();                        \
      }                                              \
      default: {                                     \
        constexpr FloatType kType = FloatType::f32;  \
        return __VA_ARGS__();                        \
      }                                              \
    }                                                \
  }()

// Binds `Math` to the formulas for logits of `type`, a constant, and for `beta`.
#define GKD_MATH_SWITCH(type, beta, Math, ...)                            \
  [&] {                                                                   \
    if ((beta) < kFastMinimumWeight || 1 - (beta) < kFastMinimumWeight) { \
      using Math = Accurate;                                              \
      return __VA_ARGS__();                                               \
    }                                                                     \
    using Math = MathOf<type>;                                            \
    return __VA_ARGS__();                                                 \
  }()

// Binds `Functor` to the functor of `kind`, one of GKD_DIVERGENCES.
#define GKD_DIVERGENCE_SWITCH(kind, Math, ...)                        \
  [&] {                                                               \
    const auto body = [&]<class Functor>() { return __VA_ARGS__(); }; \
    switch (kind) { GKD_DIVERGENCES(GKD_DIVERGENCE_CASE) }            \
  }()

#define GKD_DIVERGENCE_CASE(name, ...) \
  case DivergenceKind::name:           \
    return body.template operator()<__VA_ARGS__>();
