"""Import Megatron-Core and mcore-bridge in the order that portability needs; import this module before either.

`models` and `runtime.mesh` import it, so that modules which import from there need not; ruff sorts Megatron-Core and
mcore-bridge behind the package's own modules (`tests/runtime/test_boundaries.py`).
"""

# ruff: noqa: E402  (the order of the imports is the purpose of this module)

import os

from megatron_gkd.runtime.quiet import hide_import_warnings, hide_log_warnings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's advice for overlapping communication
hide_import_warnings()

from megatron_gkd.runtime.portability import builds_on_host, make_portable
from megatron_gkd.runtime.triton_kernels import replace_missing_triton_kernels

replace_missing_triton_kernels()
make_portable()

from megatron_gkd.runtime.embedding_gradient import add_embedding_gradients_directly
from megatron_gkd.runtime.megatron_workarounds import apply_megatron_workarounds
from megatron_gkd.runtime.transformer_engine import install_fallback

install_fallback()
apply_megatron_workarounds()
add_embedding_gradients_directly()

import transformers  # noqa: F401

from megatron_gkd.runtime.gated_delta_rule import install_gated_delta_rule
from megatron_gkd.runtime.rotary_embedding import rotate_in_two_passes

import mcore_bridge  # noqa: F401

install_gated_delta_rule()
if builds_on_host():
    rotate_in_two_passes()
hide_log_warnings()
