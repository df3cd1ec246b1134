"""The one place that knows which device this is.

On a machine with CUDA nothing here changes anything. Without it, `make_portable()` lets the real Megatron-Core run on
CPUs with gloo, by answering the few `torch.cuda` calls that it makes unconditionally. Everything else in the project
asks this module for `device()`, `backend()`, streams and memory, and never for "cuda or cpu".

Megatron-Core and mcore-bridge must be imported after `make_portable()`; `runtime.preload` does it in the right order.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import re
import resource
from pathlib import Path

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_applied = False


def _has_cuda() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device that this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if _has_cuda() else _CPU


def device_name() -> str:
    """Return the product name of the GPU, or of the processor where there is none."""
    if _has_cuda():
        return torch.cuda.get_device_name()
    described = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", described.read_text()) if described.exists() else None
    return f"CPU ({found[1] if found else platform.processor() or platform.machine()})"


def backend() -> str:
    """The torch.distributed backend of that device."""
    return "nccl" if _has_cuda() else "gloo"


def sends_are_stream_ordered() -> bool:
    """True where a tensor may be freed while its send is under way, as NCCL allows and gloo does not."""
    return _has_cuda()


def builds_on_host() -> bool:
    """Whether Megatron should create parameters in host memory: True where there is no other."""
    return not _has_cuda()


def select_device(local_rank: int) -> None:
    """Bind this process to its device, before any process group exists."""
    if _has_cuda():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())


def num_gpus() -> int:
    """Return how many GPUs this process sees."""
    return torch.cuda.device_count()


def synchronize() -> None:
    """Wait for the device, so that a clock read next to it means something."""
    if _has_cuda():
        torch.cuda.synchronize()


def empty_cache() -> None:
    """Give memory that torch holds but does not use back to the device."""
    if _has_cuda():
        torch.cuda.empty_cache()


def peak_memory_bytes() -> int:
    """Highest memory use so far in bytes: of the allocator on a GPU, of the whole process (resident set) on a CPU."""
    if _has_cuda():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def random_state() -> torch.Tensor | None:
    """Return the device's random state; None where it is that of the host."""
    return torch.cuda.get_rng_state() if _has_cuda() else None


def set_random_state(state: torch.Tensor | None) -> None:
    """Set what `random_state` returned on a machine of the same kind."""
    if _has_cuda() and state is not None:
        torch.cuda.set_rng_state(state)


def pinned_bytes(num_bytes: int) -> torch.Tensor:
    """Return uninitialized host memory as a uint8 tensor, page-locked where that speeds up copies."""
    return torch.empty(num_bytes, dtype=torch.uint8, device=_CPU, pin_memory=_has_cuda())


def make_portable() -> None:
    """Let Megatron-Core run without CUDA. Idempotent; does nothing where a CUDA device is present."""
    global _applied
    if _applied:
        return
    _applied = True
    if not _has_cuda():
        _answer_cuda_calls()
        _CudaMeansCpu().__enter__()
        _patch_gloo()
        _patch_rng_tracker()
        _patch_token_dispatcher()


_METHODS = frozenset({torch.Tensor.cuda, torch.Tensor.pin_memory, torch.Tensor.to, torch.Tensor.type})


class _CudaMeansCpu(TorchFunctionMode):
    """Sends whatever asks for a CUDA device, by argument or by method, to the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
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

    def __init__(self, *args, **kwargs):
        pass

    def _nothing(self, *args, **kwargs):
        return None

    wait_stream = wait_event = record_stream = synchronize = record = wait = _nothing

    def record_event(self, *args, **kwargs):
        return self

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return False


def _answer_cuda_calls() -> None:
    cuda = torch.cuda

    # Each name gets a function object of its own: torch.compile's tables refuse one that serves several names.
    cuda.current_device = lambda: _CPU
    cuda.set_device = lambda *args, **kwargs: None
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.empty_cache = lambda *args, **kwargs: None
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.manual_seed_all = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.Stream = cuda.Event = _NullStream
    cuda.current_stream = lambda *args, **kwargs: _NullStream()
    cuda.default_stream = lambda *args, **kwargs: _NullStream()
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.is_current_stream_capturing = lambda: False
    cuda.nvtx.range_push = lambda *args, **kwargs: None
    cuda.nvtx.range_pop = lambda *args, **kwargs: None


def _patch_gloo() -> None:
    """Make gloo's collectives accept what NCCL's do, as expert tensor parallelism needs it."""
    dist.scatter = _contiguous(dist.scatter)
    dist.all_gather = _uneven_all_gather(dist.all_gather)
    dist.reduce_scatter = _uneven_reduce_scatter(dist.all_reduce, dist.reduce_scatter)


def _contiguous(scatter):
    """Gloo's scatter copies raw memory, which is wrong for views: hand it contiguous tensors."""

    @functools.wraps(scatter)
    def contiguous_scatter(tensor, scatter_list=None, *args, **kwargs):
        if scatter_list is not None:
            scatter_list = [entry.contiguous() for entry in scatter_list]
        return scatter(tensor, scatter_list, *args, **kwargs)

    return contiguous_scatter


def _uneven_all_gather(all_gather):
    """Gloo refuses tensors of different lengths: pad them to the longest."""

    @functools.wraps(all_gather)
    def padded_all_gather(tensor_list, tensor, group=None, async_op=False):
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


def _uneven_reduce_scatter(all_reduce, reduce_scatter):
    """As `_uneven_all_gather`, for sums of which each rank keeps a part."""

    @functools.wraps(reduce_scatter)
    def summed_reduce_scatter(output, input_list, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if not output.dim() or all(entry.shape == output.shape for entry in input_list):
            return reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
        whole = torch.cat(list(input_list))
        all_reduce(whole, op=op, group=group)
        rank = dist.get_rank(group)
        output.copy_(whole.split([len(entry) for entry in input_list])[rank])
        return None

    return summed_reduce_scatter


def _patch_rng_tracker() -> None:
    """Megatron's per-rank random states, kept in the CPU generator."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    @contextlib.contextmanager
    def fork(self, name=random._MODEL_PARALLEL_RNG_TRACKER_NAME):
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
    """A helper that has nothing to move leaves a tensor where its callers want numpy."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def maybe_move_tensor_to_cpu(tensor, as_numpy=False, record_stream=False):
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = moe_utils.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu
