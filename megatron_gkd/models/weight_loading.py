"""Read a checkpoint's weights into a sharded model, and check that every tensor and every parameter was used.

mcore-bridge looks up the tensors that it knows by name and ignores all others, and a parameter that it does not look up
keeps its initial values. Either gives a different model without an error, so both are errors here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from megatron_gkd.checkpoint_format.quantization import is_scale
from megatron_gkd.checkpoint_format.stored_tensor import StoredTensor
from megatron_gkd.checkpoint_format.weight_files import embedding_name, head_name, shorten
from megatron_gkd.models.block_scales import BlockScales
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.models.lazy_tensor import LazyTensor
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.agreement import raise_together
from megatron_gkd.runtime.current_phase import note_progress
from megatron_gkd.runtime.quiet import hidden_stderr

_COMPARED_ROWS = 8192


class Bridge(Protocol):
    """The part of mcore-bridge's bridges that is used here."""

    def load_weights(
        self,
        mg_models: Sequence[nn.Module],
        hf_model_dir: str,
        *,
        converter: Callable[[str, LazyTensor], tuple[str, LazyTensor] | None],
    ) -> None:
        """Read the tensors in `hf_model_dir`, which `converter` may replace or leave out (None), into the chunks."""
        ...


def read_weights(
    bridge: Bridge,
    chunks: Sequence[nn.Module],
    checkpoint: Checkpoint,
    report: Callable[[int], None] = lambda read: None,
) -> None:
    """Read this rank's share of `checkpoint` into `chunks`. All ranks of the world must call it.

    Args:
        bridge: mcore-bridge's, of the model.
        chunks: the model's chunks on this rank.
        checkpoint: the checkpoint to read.
        report: called with the number of tensors that this rank has read so far.

    Raises:
        UserError: in all ranks; a tensor can't be read or was not used by any rank, or a parameter was not filled or
            holds values that are not finite.
    """
    parameters = {
        f"chunk {index}: {name}" if len(chunks) > 1 else name: parameter
        for index, chunk in enumerate(chunks)
        for name, parameter in _stored_tensors(chunk)
    }
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.fill_(torch.nan)  # what is still there afterwards was not filled
    read: set[str] = set()
    problem = _load(bridge, chunks, checkpoint, read, report) or _describe_unfilled(parameters)
    raise_together(None if problem is None else f"{checkpoint.path}: {problem}")
    unused = _unused_everywhere(sorted(checkpoint.tensors), read)
    problem = _describe_unused(unused, checkpoint) if dist.get_rank() == 0 else None
    raise_together(None if problem is None else f"{checkpoint.path}: {problem}")


def _stored_tensors(chunk: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a chunk that a checkpoint has: its parameters, and the routers' correction biases."""
    yield from chunk.named_parameters()
    for name, buffer in chunk.named_buffers():
        if name.endswith(".expert_bias"):
            yield name, buffer


class _RecordedTensor:
    """Wraps mcore-bridge's lazy tensor, and records its name in `read` when it is loaded."""

    def __init__(self, name: str, tensor: LazyTensor, read: set[str], report: Callable[[int], None]) -> None:
        self._name, self._tensor, self._read, self._report = name, tensor, read, report

    def load(self) -> Tensor:
        self._read.add(self._name)
        tensor = self._tensor.load()
        note_progress()
        self._report(len(self._read))
        return tensor


class _ChangedTensor:
    """Wraps a lazy tensor: `changes` get its name and its values, one after the other, when it is loaded."""

    def __init__(self, name: str, tensor: LazyTensor, changes: Sequence[Callable[[str, Tensor], Tensor]]) -> None:
        self._name, self._tensor, self._changes = name, tensor, changes

    def load(self) -> Tensor:
        tensor = self._tensor.load()
        for change in self._changes:
            tensor = change(self._name, tensor)
        return tensor


def _load(
    bridge: Bridge, chunks: Sequence[nn.Module], checkpoint: Checkpoint, read: set[str], report: Callable[[int], None]
) -> str | None:
    """Load the weights and add the names of the tensors to `read`. Return what failed."""
    blocks = checkpoint.block_size
    scales = None if blocks is None else BlockScales(blocks, next(chunks[0].parameters()).dtype)
    changes = [] if scales is None else [scales.dequantize]
    if checkpoint.adapters is not None:
        changes.append(checkpoint.adapters.merge)

    def record(name: str, tensor: LazyTensor) -> tuple[str, LazyTensor] | None:
        recorded = _RecordedTensor(name, tensor, read, report)
        if scales is not None and is_scale(name):
            scales.add(name, recorded)
            return None
        return name, _ChangedTensor(name, recorded, changes)

    try:
        with hidden_stderr():
            bridge.load_weights(list(chunks), str(checkpoint.path), converter=record)
    except KeyError as error:
        return f"no safetensors file has the tensor {error.args[0]}, which the model needs"
    except Exception as error:  # of any kind: the other ranks must raise it, too
        return f"the weights can't be read ({type(error).__name__}: {error})"
    return None


def _describe_unfilled(parameters: Mapping[str, Tensor]) -> str | None:
    """Name the parameters that still hold the NaN from before the load, or other values that are not finite."""
    not_finite = [name for name, parameter in parameters.items() if not bool(parameter.detach().isfinite().all())]
    unfilled = [name for name in not_finite if bool(parameters[name].detach().isnan().all())]
    if unfilled:
        return (
            f"no tensor fills the model's {shorten(unfilled)} in rank {dist.get_rank()}, or all its values in the "
            "files are NaN"
        )
    if not_finite:
        return f"NaN or infinite values in the weights: the model's {shorten(not_finite)} in rank {dist.get_rank()}"
    return None


def _unused_everywhere(names: Sequence[str], read: set[str]) -> list[str]:
    """Return the `names` that no rank of the world has read. All ranks must call it, with the same names."""
    used = torch.tensor([name in read for name in names], dtype=torch.int32, device=portability.device())
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    return [name for name, is_used in zip(names, used.tolist(), strict=True) if not is_used]


def _describe_unused(unused: Sequence[str], checkpoint: Checkpoint) -> str | None:
    tensors = checkpoint.tensors
    head = head_name(unused)
    if checkpoint.is_tied and head is not None:
        unused = [name for name in unused if name != head]
        embedding = embedding_name(tensors)
        if not _are_equal(checkpoint.path, tensors, head, embedding):
            return (
                f"{tensors[head].file}: {head} differs from {embedding}, but config.json has tie_word_embeddings = "
                "true; set it to false, or remove the tensor"
            )
    if unused:
        return f"{tensors[unused[0]].file}: the model has no parameter for {shorten(unused)}"
    return None


def _are_equal(path: Path, tensors: Mapping[str, StoredTensor], one: str, other: str) -> bool:
    with (
        safe_open(path / tensors[one].file, framework="pt") as one_file,
        safe_open(path / tensors[other].file, framework="pt") as other_file,
    ):
        ones, others = one_file.get_slice(one), other_file.get_slice(other)
        rows = range(0, tensors[one].shape[0], _COMPARED_ROWS)
        return all(torch.equal(ones[row : row + _COMPARED_ROWS], others[row : row + _COMPARED_ROWS]) for row in rows)
