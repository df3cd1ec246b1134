"""Imports Megatron-Core and mcore-bridge in the order that portability needs. Import this module before either."""

import logging
import os
import warnings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's advice for overlapping communication
for message in (
    "(Transformer Engine and )?Apex (is|are) not installed",
    "Transformer Engine and Apex are not installed",
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
    "`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
    "When using async grad allreduce",
    "MimoModelConfig is experimental",
):
    warnings.filterwarnings("ignore", message=message)

from megatron_gkd.runtime.portability import make_portable  # noqa: E402

make_portable()

from megatron_gkd.runtime.corrections import apply_corrections  # noqa: E402
from megatron_gkd.runtime.transformer_engine import install  # noqa: E402

install()
apply_corrections()

import mcore_bridge  # noqa: E402, F401
import transformers  # noqa: E402, F401

for name in ("megatron.core", "mcore_bridge"):
    logging.getLogger(name).setLevel(logging.ERROR)
