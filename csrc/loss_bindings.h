#pragma once

#include <torch/extension.h>

namespace gkd {

// Adds what computes a loss in one pass to the module.
void define_loss(pybind11::module_& m);

}  // namespace gkd
