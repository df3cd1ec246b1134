"""Hide messages of other libraries that a user can't act on, unless MEGATRON_GKD_SHOW_WARNINGS=1 is set.

Errors are never hidden.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator

_PATTERNS = (
    "(Transformer Engine and )?Apex (is|are) not installed",
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
    "`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
    "When using async grad allreduce",
    "MimoModelConfig is experimental",
    "If you are using transformer_engine as the transformer implementation",
)


def shows_warnings() -> bool:
    """Return whether the user wants to see everything that other libraries write."""
    return os.environ.get("MEGATRON_GKD_SHOW_WARNINGS") == "1"


def hide_import_warnings() -> None:
    """Filter the warnings that Megatron-Core gives while it is imported and used without its optional libraries."""
    if not shows_warnings():
        for pattern in _PATTERNS:
            warnings.filterwarnings("ignore", message=pattern)


def hide_log_warnings() -> None:
    """Set the loggers of Megatron-Core and mcore-bridge to errors only. Call it after both are imported."""
    if not shows_warnings():
        for name in ("megatron.core", "mcore_bridge"):
            logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def hidden_stderr() -> Iterator[None]:
    """Hide what Python code writes to stderr, such as mcore-bridge's progress bar. Exceptions pass."""
    with contextlib.nullcontext() if shows_warnings() else contextlib.redirect_stderr(io.StringIO()):
        yield
