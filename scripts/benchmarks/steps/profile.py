"""Where the time of our step goes: operators by the path of phases, modules and autograd nodes that call them."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.steps.cases import Case
from benchmarks.steps.ours import build, microbatches_of

Stack = tuple[str, ...]

PRODUCTS, LOSS, OPTIMIZER, OPERATORS, PYTHON = KINDS = (
    "products and attention",
    "loss",
    "optimizer",
    "other operators",
    "Python and dispatch",
)
_PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "linear", "matmul")}
_LOSS = "_FusedLinear"  # the extension's kernels are called from it, without an operator of torch
_NODE = "autograd::engine::evaluate_function: "


def profile_steps(case: Case, folder: Path, steps: int) -> dict[Stack, float]:
    """Return the seconds that each path takes by itself in a step: the median of `steps` steps.

    Args:
        case: the models and rows.
        folder: an empty folder for the models and the meeting place of the process with itself.
        steps: how many to measure, after two that are not.
    """
    case.save_models(folder)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
    run = build(case, folder, {})
    trainer, microbatches = run.trainer(folder), microbatches_of(case, 0, 1)
    # The teacher's modules are frozen in a dataclass of its source; whatever it is called, its modules are found.
    _name_modules(*run.student.chunks, *_modules_of(run.teacher))
    samples: dict[Stack, list[float]] = defaultdict(list)
    for step in range(1, steps + 3):
        with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("step"):
            trainer.train_step(step, microbatches)
        if step > 2:
            found: dict[Stack, float] = defaultdict(float)
            for stack, seconds in _own_times(profiler.events()):
                found[stack] += seconds
            for stack, seconds in found.items():
                samples[stack].append(seconds)
    dist.destroy_process_group()
    return {stack: median(found) for stack, found in samples.items()}


def kind_of(stack: Stack) -> str:
    """Return the kind of work at the end of a path; one of `KINDS`."""
    name = stack[-1]
    if name in _PRODUCTS or "scaled_dot_product" in name or "flash_attention" in name:
        return PRODUCTS
    if name.startswith("megatron_gkd::") or name == _LOSS:
        return LOSS
    if "gkd/optimizer" in stack:
        return OPTIMIZER
    return OPERATORS if "::" in name else PYTHON


def totals(times: dict[Stack, float]) -> dict[str, float]:
    """Return the seconds of a step by kind."""
    found = dict.fromkeys(KINDS, 0.0)
    for stack, seconds in times.items():
        found[kind_of(stack)] += seconds
    return found


def _modules_of(holder: object) -> Iterator[nn.Module]:
    """Yield the models that an object holds, at most three attributes deep."""
    seen: set[int] = set()

    def look(value: object, depth: int) -> Iterator[nn.Module]:
        if id(value) in seen or depth > 3:
            return
        seen.add(id(value))
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, list | tuple):
            for one in value:
                yield from look(one, depth)
        elif type(value).__module__.startswith("megatron_gkd."):
            for one in vars(value).values() if hasattr(value, "__dict__") else ():
                yield from look(one, depth + 1)

    return look(holder, 0)


def _name_modules(*models: nn.Module) -> None:
    """Let each module's forward pass be a span of the profile, named after its class."""
    for module in {id(one): one for model in models for one in model.modules()}.values():
        module.forward = _spanned(type(module).__name__, module.forward)


def _spanned(name: str, forward: Any) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        with record_function(name):
            return forward(*arguments, **options)

    return call


def _own_times(events: Any) -> Iterator[tuple[Stack, float]]:
    """Yield path and seconds of each event, without those that it contains."""
    for event in events:
        stack, above = [event.name], event.cpu_parent
        while above is not None:
            stack.append(above.name)
            above = above.cpu_parent
        if stack[-1] == "step":
            names = (name.removeprefix(_NODE) for name in reversed(stack))
            yield tuple(_without_repeats(names)), event.self_cpu_time_total / 1e6


def _without_repeats(names: Iterator[str]) -> Iterator[str]:
    """Drop names that repeat the one before: an autograd node and its function, a module and its wrapper."""
    last = None
    for name in names:
        if name != last:
            yield name
        last = name


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread inside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
