#pragma once

#include <torch/extension.h>

namespace gkd {

// Adds the passes over a top-k to the module.
void define_top_k(pybind11::module_& m);

}  // namespace gkd
