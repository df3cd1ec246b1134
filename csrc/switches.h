// From values known at run time to template arguments. Inside a body, the name that a switch binds is a constant or type.

#pragma once

#include <type_traits>

#include "divergences.h"
#include "params.h"

namespace gkd {

// Formulas by the logits' type: 16-bit logits carry larger errors than the fast logarithm makes.
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

// Binds `Functor` to each divergence that a gradient may be wanted of.
#define GKD_DIVERGENCE_SWITCH(kind, Math, ...)     \
  [&] {                                            \
    switch (kind) {                                \
      case DivergenceKind::forward_kl: {           \
        using Functor = ForwardKl<Math>;           \
        return __VA_ARGS__();                      \
      }                                            \
      case DivergenceKind::reverse_kl: {           \
        using Functor = ReverseKl<Math>;           \
        return __VA_ARGS__();                      \
      }                                            \
      case DivergenceKind::total_variation: {      \
        using Functor = TotalVariation<Math>;      \
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
