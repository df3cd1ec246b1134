"""Imports Megatron-Core and mcore-bridge in the order that portability needs. Import this module before either."""

import logging
import os
import warnings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Said once in the README: without Transformer Engine and Apex, torch's own optimizers and kernels serve.
warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (is|are) not installed")
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")

from megatron_gkd.runtime.portability import make_portable  # noqa: E402

make_portable()

from megatron_gkd.runtime.transformer_engine import install  # noqa: E402

install()

import mcore_bridge  # noqa: E402, F401
import transformers  # noqa: E402, F401

logging.getLogger("megatron.core").setLevel(logging.WARNING)
