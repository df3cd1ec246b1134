"""Patch torch and Megatron-Core so that Megatron-Core runs on CPUs with gloo; see `runtime.portability`.

Megatron-Core calls some functions of `torch.cuda` unconditionally: here the CPU takes their place, or the meta device
in a process that computes there.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._device import _device_constructors

from megatron_gkd.runtime import portability


def apply_cpu_patches() -> None:
    """Apply all patches, once, before Megatron-Core is imported."""
    _replace_cuda_functions()
    _import_uncompiled()
    _place_tensors()
    _patch_gloo()
    _patch_rng_tracker()
    _patch_token_dispatcher()


def _place_tensors() -> None:
    """Let functions and methods that name a CUDA device use the process's device.

    Only those that can name one are replaced. A mode of torch (`TorchFunctionMode`) would do it as well, but in each of
    the thousands of operations of a step.
    """
    for create in _creators():
        replacement = _on_process_device(create)
        setattr(torch, create.__name__, replacement)
        operator = torch.jit._builtins._find_builtin(create)
        if operator is not None:  # torch.jit.script finds functions of torch by their identity
            torch.jit._builtins._register_builtin(replacement, operator)
    for name in ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"):
        setattr(torch.Tensor, name, _on_process_device(getattr(torch.Tensor, name)))
    move, read_type = torch.Tensor.to, torch.Tensor.type

    @functools.wraps(move)
    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and _names_cuda(args[0]):
            args = (portability.device(), *args[1:])
        elif kwargs and _names_cuda(kwargs.get("device")):
            kwargs["device"] = portability.device()
        return move(self, *args, **kwargs)

    @functools.wraps(read_type)
    def type_(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = read_type(self, *args, **kwargs)
        if args or kwargs:
            return found
        # Megatron's optimizers sort parameters by the names "torch.cuda.FloatTensor" and the like.
        return "torch.cuda." + found.rpartition(".")[2]

    tensor: Any = torch.Tensor
    tensor.to, tensor.type = to, type_
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.pin_memory = lambda self, *args, **kwargs: self


def _creators() -> list[Callable]:
    """Return the functions of `torch` that make tensors on a device."""
    # `with torch.device(...)` keeps this set, and compares functions with it: it must have the originals.
    known: set[Any] = {*_device_constructors()} - {None}
    like = {getattr(torch, f"{name}_like") for name in ("empty", "full", "ones", "rand", "randint", "randn", "zeros")}
    found: list[Any] = [create for create in known | like if vars(torch).get(create.__name__) is create]
    return found


def _on_process_device(create: Callable) -> Callable:
    """Return `create`, which makes a tensor, with the process's device in place of a CUDA device."""

    @functools.wraps(create)
    def create_on_device(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            if _names_cuda(kwargs.get("device")):
                kwargs["device"] = portability.device()
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        return create(*args, **kwargs)

    return create_on_device


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
        current_device=lambda: portability.device(),
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
    dist.all_gather_into_tensor = _without_a_copy_alone(dist.all_gather_into_tensor)
    dist.reduce_scatter_tensor = _without_a_copy_alone(dist.reduce_scatter_tensor)
    dist.scatter = _with_contiguous_inputs(dist.scatter)
    dist.all_gather = _with_padding(dist.all_gather)
    dist.reduce_scatter = _by_all_reduce(dist.all_reduce, dist.reduce_scatter)


def _without_a_copy_alone(collective: Callable) -> Callable:
    """Return `collective` for one rank as well, where gloo copies from a buffer to itself, as NCCL does not."""

    @functools.wraps(collective)
    def collective_or_nothing(*tensors: Any, **kwargs: Any) -> Any:
        # The names of the tensors differ between the two collectives; Megatron gives them by place.
        if len(tensors) == 2 and _is_same_memory(*tensors) and dist.get_world_size(kwargs.get("group")) == 1:
            return _NullStream() if kwargs.get("async_op") else None
        return collective(*tensors, **kwargs)

    return collective_or_nothing


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


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
