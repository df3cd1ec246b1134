"""Run Megatron-Core's real modules on the meta device: tensors have shapes and no memory, and no value is computed.

`enter_meta_device` prepares a process for it, before Megatron-Core is imported; such a process can do nothing else
afterwards. A process group of any size is simulated by one of its ranks, see `world`. What the modules read from
values, such as the routing of tokens to experts, is replaced by an assumption, and kernels that have no form for the
meta device by functions that allocate and keep what the kernels do.
"""

from __future__ import annotations

import os
import sys

from megatron_gkd.runtime import portability

_OPTIONAL = ("transformer_engine", "transformer_engine_torch", "apex", "fla", "causal_conv1d")
"""Packages of GPU kernels, without which Megatron's modules are the same on every machine."""


def enter_meta_device() -> None:
    """Let this process compute on the meta device from now on. Idempotent; call it before Megatron-Core is imported.

    Raises:
        RuntimeError: Megatron-Core is imported already.
    """
    if portability.has_no_memory():
        return
    portability.compute_without_memory()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for name in _OPTIONAL:
        sys.modules[name] = None  # type: ignore[assignment]  # import then fails as if it were not installed

    import megatron_gkd.runtime.preload  # noqa: F401
    from megatron_gkd.runtime.meta_device import attention, collectives, delta_rule, experts, norms, optimizers, rope

    collectives.register_kernels()
    attention.replace_core()
    norms.replace_norms()
    experts.balance_routing()
    delta_rule.replace_delta_rule()
    rope.compute_frequencies_on_host()
    optimizers.allow_fused_updates()
