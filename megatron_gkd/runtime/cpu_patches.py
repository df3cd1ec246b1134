"""Patch torch and Megatron-Core so that Megatron-Core runs on CPUs with gloo; see `runtime.portability`.

Megatron-Core calls some functions of `torch.cuda` unconditionally: here the CPU takes their place.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def apply_cpu_patches() -> None:
    """Apply all patches, once, before Megatron-Core is imported."""
    _replace_cuda_functions()
    _import_uncompiled()
    _CudaMeansCpu().__enter__()
    _patch_gloo()
    _patch_rng_tracker()
    _patch_token_dispatcher()


_METHODS = frozenset({torch.Tensor.cuda, torch.Tensor.pin_memory, torch.Tensor.to, torch.Tensor.type})


class _CudaMeansCpu(TorchFunctionMode):
    """Puts tensors on the CPU where a function or method names a CUDA device."""

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if kwargs:
            if _names_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        elif func not in _METHODS:  # the usual case, on every operation of the model
            return func(*args)
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizers sort parameters by the names "torch.cuda.FloatTensor" and the like.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **(kwargs or {}))


def _names_cuda(where: object) -> bool:
    if isinstance(where, torch.device):
        return where.type == "cuda"
    if isinstance(where, str):
        return where.split(":")[0] == "cuda"
    return isinstance(where, int) and not isinstance(where, bool)


class _NullStream:
    """A stream or event that is always done. A class, since libraries annotate with `torch.cuda.Stream`."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _do_nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = wait_event = record_stream = synchronize = record = wait = _do_nothing

    def record_event(self, *args: Any, **kwargs: Any) -> _NullStream:
        return self

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _NullStream) -> float:
        return 0.0

    def __enter__(self) -> _NullStream:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def _replace_cuda_functions() -> None:
    # Each name gets a function object of its own: torch.compile's tables refuse one that serves several names.
    vars(torch.cuda).update(
        current_device=lambda: _CPU,
        set_device=lambda *args, **kwargs: None,
        synchronize=lambda *args, **kwargs: None,
        empty_cache=lambda *args, **kwargs: None,
        get_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
        set_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
        manual_seed=lambda seed: torch.default_generator.manual_seed(seed),
        manual_seed_all=lambda seed: torch.default_generator.manual_seed(seed),
        Stream=_NullStream,
        Event=_NullStream,
        current_stream=lambda *args, **kwargs: _NullStream(),
        default_stream=lambda *args, **kwargs: _NullStream(),
        stream=lambda *args, **kwargs: contextlib.nullcontext(),
        is_current_stream_capturing=lambda: False,
    )
    vars(torch.cuda.nvtx).update(
        range_push=lambda *args, **kwargs: None,
        range_pop=lambda *args, **kwargs: None,
    )


def _import_uncompiled() -> None:
    """Import Megatron-Core without compiling its small functions: each would take a C++ compiler half a minute."""
    original = torch.compile
    vars(torch)["compile"] = lambda function, *args, **kwargs: function
    try:
        from megatron.core import jit
    finally:
        vars(torch)["compile"] = original
    jit.disable_jit_fuser()


def _patch_gloo() -> None:
    """Make gloo's collectives accept what NCCL's do, as expert tensor parallelism needs it."""
    dist.scatter = _with_contiguous_inputs(dist.scatter)
    dist.all_gather = _with_padding(dist.all_gather)
    dist.reduce_scatter = _by_all_reduce(dist.all_reduce, dist.reduce_scatter)


def _with_contiguous_inputs(scatter: Callable) -> Callable:
    """Return `scatter` with contiguous inputs: gloo's copies raw memory, which is wrong for views."""

    @functools.wraps(scatter)
    def contiguous_scatter(
        tensor: Tensor, scatter_list: Sequence[Tensor] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if scatter_list is not None:
            scatter_list = [entry.contiguous() for entry in scatter_list]
        return scatter(tensor, scatter_list, *args, **kwargs)

    return contiguous_scatter


def _with_padding(all_gather: Callable) -> Callable:
    """Return `all_gather` for tensors of different lengths, which gloo refuses: they are padded to the longest."""

    @functools.wraps(all_gather)
    def padded_all_gather(
        tensor_list: Sequence[Tensor],
        tensor: Tensor,
        group: dist.ProcessGroup | None = None,
        async_op: bool = False,
    ) -> Any:
        longest = max(entry.shape[0] for entry in tensor_list) if tensor.dim() else 0
        if not tensor.dim() or all(entry.shape[0] == longest for entry in tensor_list):
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        gathered = [torch.empty_like(padded) for _ in tensor_list]
        all_gather(gathered, padded, group=group)
        for entry, whole in zip(tensor_list, gathered, strict=True):
            entry.copy_(whole[: len(entry)])
        return None

    return padded_all_gather


def _by_all_reduce(all_reduce: Callable, reduce_scatter: Callable) -> Callable:
    """Return `reduce_scatter` for tensors of different lengths, which gloo refuses: all are reduced everywhere."""

    @functools.wraps(reduce_scatter)
    def uneven_reduce_scatter(
        output: Tensor,
        input_list: Sequence[Tensor],
        op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
        group: dist.ProcessGroup | None = None,
        async_op: bool = False,
    ) -> Any:
        if not output.dim() or all(entry.shape == output.shape for entry in input_list):
            return reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
        whole = torch.cat(list(input_list))
        all_reduce(whole, op=op, group=group)
        rank = dist.get_rank(group)
        output.copy_(whole.split([len(entry) for entry in input_list])[rank])
        return None

    return uneven_reduce_scatter


def _patch_rng_tracker() -> None:
    """Keep Megatron's per-rank random states in the CPU generator."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    @contextlib.contextmanager
    def fork(self: random.CudaRNGStatesTracker, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        if name not in self.states_:
            raise KeyError(f"random state {name!r} is not added; known: {sorted(self.states_)}")
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)

    random.CudaRNGStatesTracker.fork = fork


def _patch_token_dispatcher() -> None:
    """Return numpy arrays where the callers expect them: the helper leaves a tensor if there is nothing to move."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = moe_utils.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu
