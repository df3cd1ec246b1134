// What the gradient at an entry takes of its row.

#pragma once

namespace gkd {

// The gradient is factor slope + offset p, in a form's slopes and p's: offset = label - factor slope_sum, with the factor
// of p's in place of that of slopes.
struct RowFactors {
  float factor;
  float slope_sum;
  float label;  // the weight of a cross-entropy at the divergence's temperature
  float offset;
};

}  // namespace gkd
