"""Keep vLLM's changes of the process out of the training that shares it."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator

import numpy as np
import torch

from megatron_gkd.runtime import portability

# What vLLM replaces in torch, on CPUs.
_FUNCTIONS = ((torch, "set_num_threads"), (torch, "Event"), (torch.cuda, "Stream"))


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Restore random states, threads, torch's functions and the environment (but for vLLM's own) at the end."""
    random_states = random.getstate(), np.random.get_state(), torch.get_rng_state(), torch.cuda.get_rng_state()
    functions = [(owner, name, getattr(owner, name)) for owner, name in _FUNCTIONS]
    threads, dtype, environment = torch.get_num_threads(), torch.get_default_dtype(), dict(os.environ)
    # Compiling its sampler for a CPU takes most of a minute, in every process.
    stance = torch.compiler.set_stance("force_eager") if portability.builds_on_host() else contextlib.nullcontext()
    try:
        with stance:
            yield
    finally:
        for owner, name, function in functions:
            setattr(owner, name, function)
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        for name in os.environ.keys() | environment.keys():
            if not name.startswith("VLLM_"):
                _set_variable(name, environment.get(name))
        random.setstate(random_states[0])
        np.random.set_state(random_states[1])
        torch.set_rng_state(random_states[2])
        torch.cuda.set_rng_state(random_states[3])


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    elif os.environ.get(name) != value:
        os.environ[name] = value
