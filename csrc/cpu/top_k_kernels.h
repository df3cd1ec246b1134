// The passes over a top-k that read whole rows, on a CPU. Compiled once per instruction set: see top_k_*.cpp.

#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "../switches.h"
#include "../top_k_rows.h"
#include "vector.h"

namespace gkd::GKD_CPU_NAMESPACE {

constexpr int64_t kColumns = 2048;         // a block that stays in the first-level cache between two loops
constexpr int64_t kSearched = 8 * kLanes;  // columns among which candidates are looked for at once
constexpr float kMinusInfinity = -__builtin_inff();

// A team of one.
struct Alone {
  static constexpr int64_t rank = 0;
  static constexpr int64_t size = 1;
  static double largest(double x) { return x; }
  static double total(double x) { return x; }
};

template <FloatType type>
struct Reader {
  using Element = typename Storage<type>::Element;
  static float read(const Element* row, int64_t column) { return load_one<type>(row + column); }
};

template <FloatType type>
const typename Storage<type>::Element* row_of(const Logits& logits, int64_t row) {
  return static_cast<const typename Storage<type>::Element*>(logits.student) + row * logits.student_stride;
}

// Sums of exponentials that follow the maximum.
struct Running {  // relative to the maximum, or 0 without one
  double maximum = kNone, sum = 0, untempered = 0;

  void raise(double candidate, float scale) {
    if (!(candidate > maximum)) return;
    const double shift = finite(maximum) - candidate;
    if (sum != 0) sum *= std::exp2(shift * scale);
    if (untempered != 0) untempered *= std::exp2(shift * double(kLog2E));
    maximum = candidate;
  }
};

// ---- select

// A logit that at least k columns reach: the k-th of the maxima of many groups of columns, each lane of some vectors.
template <FloatType type>
float lower_bound(const typename Storage<type>::Element* row, int64_t columns, int64_t k, std::vector<float>& maxima) {
  const int64_t vectors = columns / kLanes,
                group = std::min(vectors, vectors * kLanes / (4 * k));  // vectors in a group
  if (group < 2) return kMinusInfinity;
  maxima.clear();
  for (int64_t from = 0; from + group <= vectors; from += group) {
    Floats most = splat<Floats>(kMinusInfinity);
    for (int64_t i = from; i < from + group; ++i) {
      const Floats z = load<type>(row + i * kLanes);
      most = z > most ? z : most;
    }
    for (int lane = 0; lane < kLanes; ++lane) maxima.push_back(most[lane]);
  }
  std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(), std::greater<float>());
  return maxima[k - 1];
}

template <class Lanes>
bool any(const Lanes& mask) {
  uint64_t words[sizeof(Lanes) / 8], all = 0;
  std::memcpy(words, &mask, sizeof mask);
  for (const uint64_t word : words) all |= word;
  return all != 0;
}

// Adds all columns that reach `bound`, and NaN, to `candidates`, and the others to `others`.
template <FloatType type>
void split_row(const TopKSelectParams& params, const typename Storage<type>::Element* row, float bound,
               std::vector<uint64_t>& candidates, Running& others) {
  const int64_t columns = params.logits.columns;
  for (int64_t begin = 0; begin < columns; begin += kColumns) {
    const int64_t end = std::min(begin + kColumns, columns);
    Floats most = splat<Floats>(kMinusInfinity);
    for (int64_t from = begin; from < end; from += kSearched) {
      const int64_t to = std::min(from + kSearched, end);
      Ints found = {};
      for_each_vector(from, to, [&](int64_t j, auto count) {
        const Floats z = load_count<type>(row + j, count);
        const Ints below = z < bound;
        found |= ~below;
        const Floats other = below ? z : splat<Floats>(kMinusInfinity);
        most = other > most ? other : most;
      });
      if (!any(found)) continue;
      for (int64_t j = from; j < to; ++j) {
        const float z = load_one<type>(row + j);
        if (!(z < bound)) candidates.push_back(pack_candidate(z, uint32_t(j)));
      }
    }
    if (params.scale == 0) continue;
    others.raise(maximum(most), params.scale);
    const float reference = float(finite(others.maximum));
    Floats sums = {};
    for_each_vector(begin, end, [&](int64_t j, auto count) {
      const Floats z = load_count<type>(row + j, count);
      sums += exp2((z < bound ? z - reference : splat<Floats>(kMinusInfinity)) * params.scale);
    });
    others.sum += sum(sums);
  }
}

template <FloatType type>
void select_rows(const TopKSelectParams& params, int64_t begin, int64_t end) {
  const int64_t columns = params.logits.columns, found = std::min(params.k, columns);
  const int64_t words = candidate_words(params.k, params.scale != 0);
  std::vector<uint64_t> candidates;
  std::vector<float> maxima;
  for (int64_t i = begin; i < end; ++i) {
    const auto* row = row_of<type>(params.logits, i);
    int32_t* values = params.out + i * words;
    int32_t* ids = values + words - params.k;
    Running others;
    candidates.clear();
    if (found > 0) split_row<type>(params, row, lower_bound<type>(row, columns, found, maxima), candidates, others);
    if (int64_t(candidates.size()) > found) {
      std::nth_element(candidates.begin(), candidates.begin() + found, candidates.end(), std::greater<uint64_t>());
    }
    std::sort(candidates.begin(), candidates.begin() + found, std::greater<uint64_t>());
    for (int64_t j = 0; j < params.k; ++j) {
      const bool there = j < found;
      values[j] = Lanes<float>::bits(there ? logit_of(order_of(candidates[j])) : kMinusInfinity);
      ids[j] = there ? int32_t(params.first + column_of(candidates[j])) : int32_t(kMissing);
    }
    if (params.scale == 0) continue;
    for (size_t j = found; j < candidates.size(); ++j) {
      const float z = logit_of(order_of(candidates[j]));
      others.raise(z, params.scale);
      others.sum += std::exp2((z - finite(others.maximum)) * params.scale);
    }
    values[params.k] = Lanes<float>::bits(float(others.maximum));
    values[params.k + 1] = Lanes<float>::bits(float(others.sum));
  }
}

// ---- statistics

// The others of a row: the logits in blocks, in float, without the columns of `excluded`, which rise.
template <FloatType type>
void sum_others(const TopKStatisticsParams& params, const typename Storage<type>::Element* row,
                const std::vector<int64_t>& excluded, Running& others) {
  const bool untempered = params.columns == kLabelColumns;
  alignas(64) float block[kColumns];
  auto next = excluded.begin();
  for (int64_t begin = 0; begin < params.logits.columns; begin += kColumns) {
    const int64_t end = std::min(begin + kColumns, params.logits.columns), width = end - begin;
    for_each_vector(0, width, [&](int64_t j, auto count) {
      if constexpr (std::is_same_v<decltype(count), int64_t>) {
        store_some<FloatType::f32>(block + j, load_count<type>(row + begin + j, count), count);
      } else {
        store<FloatType::f32>(block + j, load_count<type>(row + begin + j, count));
      }
    });
    for (; next != excluded.end() && *next < end; ++next) block[*next - begin] = kMinusInfinity;
    Floats most = splat<Floats>(kMinusInfinity);
    for_each_vector(0, width, [&](int64_t j, auto count) {
      const Floats z = load_count<FloatType::f32>(block + j, count);
      most = z > most ? z : most;
    });
    others.raise(maximum(most), params.scale);
    const float reference = float(finite(others.maximum));
    Floats sums[2] = {};
    for_each_vector(0, width, [&](int64_t j, auto count) {
      const Floats z = load_count<FloatType::f32>(block + j, count) - reference;
      sums[0] += exp2(z * params.scale);
      if (untempered && params.scale != kLog2E) sums[1] += exp2(z * kLog2E);
    });
    others.sum += sum(sums[0]);
    others.untempered += sum(sums[params.scale == kLog2E ? 0 : 1]);
  }
}

template <FloatType type>
void statistics_rows(const TopKStatisticsParams& params, int64_t begin, int64_t end) {
  std::vector<int64_t> excluded;
  for (int64_t i = begin; i < end; ++i) {
    const auto* row = row_of<type>(params.logits, i);
    const PartSums top = sum_tokens<Reader<type>>(params, i, row, Alone());
    Running others;
    if (params.columns != kTopColumns) {
      excluded.clear();
      for (int64_t j = 0; j < params.tokens.k; ++j) {
        const int64_t column = own_column(params.tokens, params.logits.columns, i, j);
        if (column >= 0) excluded.push_back(column);
      }
      std::sort(excluded.begin(), excluded.end());
      sum_others<type>(params, row, excluded, others);
    }
    write_statistics<Reader<type>>(params, i, row, top, {others.maximum, others.sum, others.untempered});
  }
}

// ---- gradient

template <FloatType type, bool kBucket, bool kLabels, bool kCapped>
void write_others(const TopKGradientParams& params, const TopKOthers& others,
                  const typename Storage<type>::Element* row, typename Storage<type>::Element* out) {
  for_each_vector(0, params.logits.columns, [&](int64_t j, auto count) {
    const Floats z = load_count<type>(row + j, count);
    Floats g = of_other<kBucket, kLabels>(others, params.scale, z);
    if constexpr (kCapped) g *= softcap_slope(z, params.inverse_softcap);
    if constexpr (std::is_same_v<decltype(count), int64_t>) {
      store_some<type>(out + j, g, count);
    } else {
      store<type>(out + j, g);
    }
  });
}

// `out` may be the row.
template <FloatType type>
void gradient_row(const TopKGradientParams& params, int64_t i) {
  using Element = typename Storage<type>::Element;
  const Element* row = row_of<type>(params.logits, i);
  prepare_row<Reader<type>>(params, i, row, Alone());
  Element* out = static_cast<Element*>(params.out) + i * params.out_stride;
  const TopKOthers others = params.others[i];
  const int64_t columns = params.logits.columns, k = params.tokens.k;
  const bool bucket = others.factor != 0, labels = others.label_factor != 0;
  if (bucket || labels) {
    GKD_BOOL_SWITCH(params.inverse_softcap != 0, kCapped, [&] {
      if (bucket && labels) return write_others<type, true, true, kCapped>(params, others, row, out);
      if (bucket) return write_others<type, true, false, kCapped>(params, others, row, out);
      write_others<type, false, true, kCapped>(params, others, row, out);
    });
  }
  const int64_t first_zero = bucket || labels ? columns : 0;
  std::memset(static_cast<void*>(out + first_zero), 0, (params.width - first_zero) * sizeof(Element));
  if (others.is_zero) return;
  if (others.label >= 0) store_some<type>(out + others.label, splat<Floats>(others.at_label), 1);
  for (int64_t j = 0; j < k; ++j) {
    const int64_t column = own_column(params.tokens, columns, i, j);
    if (column >= 0) store_some<type>(out + column, splat<Floats>(params.at_tokens[i * k + j]), 1);
  }
}

void top_k_select(const TopKSelectParams& params, int64_t begin, int64_t end) {
  GKD_TYPE_SWITCH(params.logits.type, [&] { select_rows<kType>(params, begin, end); });
}

void top_k_statistics(const TopKStatisticsParams& params, int64_t begin, int64_t end) {
  GKD_TYPE_SWITCH(params.logits.type, [&] { statistics_rows<kType>(params, begin, end); });
}

void top_k_gradient(const TopKGradientParams& params, int64_t begin, int64_t end) {
  GKD_TYPE_SWITCH(params.logits.type, [&] {
    for (int64_t i = begin; i < end; ++i) gradient_row<kType>(params, i);
  });
}

}  // namespace gkd::GKD_CPU_NAMESPACE
