// From values known at run time to template arguments. Inside a body, the name that a switch binds is a constant or type.

#pragma once

#include <type_traits>

#include "divergences.h"
#include "params.h"

namespace gkd {

// `Fast` has an absolute error of about 1e-7. Near beta = 0 and 1, terms are proportional to min(beta, 1 - beta), so that
// error divided by this threshold, 1e-5, stays below the rounding of 16-bit logits.
constexpr double kFastMinimumWeight = 1e-2;

// The formulas that serve logits of a type where beta is near neither 0 nor 1.
template <FloatType type>
using MathOf = std::conditional_t<type == FloatType::f32, Accurate, Fast>;

}  // namespace gkd

#define GKD_BOOL_SWITCH(condition, Name, ...)      \
  [&] {                                            \
    if (condition) {                               \
      constexpr bool Name = true;                  \
      return __VA_ARGS__();                        \
    }                                              \
    constexpr bool Name = false;                   \
    return __VA_ARGS__();                          \
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
#define GKD_MATH_SWITCH(type, beta, Math, ...)                                      \
  [&] {                                                                             \
    if ((beta) < kFastMinimumWeight || 1 - (beta) < kFastMinimumWeight) {           \
      using Math = Accurate;                                                        \
      return __VA_ARGS__();                                                         \
    }                                                                               \
    using Math = MathOf<type>;                                                      \
    return __VA_ARGS__();                                                           \
  }()

// Binds `Functor` to each divergence that a gradient may be wanted of.
#define GKD_DIVERGENCE_SWITCH(kind, Math, ...)     \
  [&] {                                            \
    switch (kind) {                                \
      case DivergenceKind::forward_kl: {           \
        using Functor = ForwardKl;                 \
        return __VA_ARGS__();                      \
      }                                            \
      case DivergenceKind::reverse_kl: {           \
        using Functor = ReverseKl;                 \
        return __VA_ARGS__();                      \
      }                                            \
      case DivergenceKind::total_variation: {      \
        using Functor = TotalVariation;            \
        return __VA_ARGS__();                      \
      }                                            \
      case DivergenceKind::skewed_forward_kl: {    \
        using Functor = SkewedForwardKl<Math>;     \
        return __VA_ARGS__();                      \
      }                                            \
      case DivergenceKind::skewed_reverse_kl: {    \
        using Functor = SkewedReverseKl<Math>;     \
        return __VA_ARGS__();                      \
      }                                            \
      case DivergenceKind::alpha: {                \
        using Functor = Alpha<Math>;               \
        return __VA_ARGS__();                      \
      }                                            \
      default: {                                   \
        using Functor = GeneralizedJsd<Math>;      \
        return __VA_ARGS__();                      \
      }                                            \
    }                                              \
  }()
