// From values known at run time to template arguments: each switch runs its body with a name bound to a constant or a
// type.

#pragma once

#include <type_traits>

#include "accurate_form.h"
#include "divergences.h"
#include "fast_forms.h"
#include "params.h"

namespace gkd {

// Fast forms have an absolute error of about 1e-7. Near beta = 0 and 1, terms are proportional to min(beta, 1 - beta), so
// that error divided by this threshold, 1e-5, stays below the rounding of 16-bit logits.
constexpr double kFastMinimumWeight = 1e-2;

// Calls `body` with the form for logits of a type and for `beta` as template argument.
template <FloatType type, class Functor, class Fast, class Body>
void with_form(double beta, const Body& body) {
  const Weights weights = Functor::weights(beta);
  if constexpr (type != FloatType::f32) {
    if constexpr (std::is_same_v<Fast, fast::GeneralizedJsd>) {
      if (beta == 0.5) return body.template operator()<fast::EvenJsd>(weights);
    }
    if (Fast::kForAnyBeta || (beta >= kFastMinimumWeight && 1 - beta >= kFastMinimumWeight)) {
      return body.template operator()<Fast>(weights);
    }
  }
  if constexpr (type == FloatType::f32 || !Fast::kForAnyBeta) {
    body.template operator()<AccurateForm<Functor>>(weights);
  }
}

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

// Binds `Form` to the form of `kind`, one of GKD_DIVERGENCES, for logits of `type`, a constant, and for `beta`; and
// `weights` to its weights.
#define GKD_FORM_SWITCH(type, kind, beta, ...)                                                  \
  [&] {                                                                                         \
    constexpr FloatType form_type = type;                                                       \
    const double form_beta = beta;                                                              \
    const auto body = [&]<class Form>(const Weights& weights) { return __VA_ARGS__(weights); }; \
    switch (kind) { GKD_DIVERGENCES(GKD_FORM_CASE) }                                            \
  }()

#define GKD_FORM_CASE(name, Functor) \
  case DivergenceKind::name:         \
    return with_form<form_type, Functor, FastForm<Functor>::type>(form_beta, body);
