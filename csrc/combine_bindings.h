#pragma once

#include <torch/extension.h>

namespace gkd {

// Adds what combines the ranks' numbers of each token to the module.
void define_combine(pybind11::module_& m);

}  // namespace gkd
