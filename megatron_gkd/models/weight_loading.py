"""Read a checkpoint's weights into a sharded model, and check that every tensor and every parameter was used.

mcore-bridge looks up the tensors that it knows by name and ignores all others, and a parameter that it does not look up
keeps its initial values. Either gives a different model without an error, so both are errors here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from megatron_gkd.checkpoint_format.weight_files import EMBEDDING, HEAD, StoredTensor
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.models.merged_adapters import MergedAdapters
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.agreement import raise_together
from megatron_gkd.runtime.quiet import hidden_stderr

_COMPARED_ROWS = 8192
_MOST_NAMES = 3


class LazyTensor(Protocol):
    """A tensor of a file, which mcore-bridge reads with `load`."""

    def load(self) -> Tensor:
        """Read the tensor."""
        ...


class Bridge(Protocol):
    """The part of mcore-bridge's bridges that is used here."""

    def load_weights(
        self,
        mg_models: Sequence[nn.Module],
        hf_model_dir: str,
        *,
        converter: Callable[[str, LazyTensor], tuple[str, LazyTensor]],
    ) -> None:
        """Read the tensors in `hf_model_dir`, each of which `converter` may replace, into the chunks."""
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
        for name, parameter in chunk.named_parameters()
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


class _RecordedTensor:
    """Wraps mcore-bridge's lazy tensor: merges its adapters, and records its name in `read` when it is loaded."""

    def __init__(
        self,
        name: str,
        tensor: LazyTensor,
        read: set[str],
        report: Callable[[int], None],
        adapters: MergedAdapters | None,
    ) -> None:
        self._name, self._tensor, self._read, self._report = name, tensor, read, report
        self._adapters = adapters

    def load(self) -> Tensor:
        self._read.add(self._name)
        tensor = self._tensor.load()
        self._report(len(self._read))
        return tensor if self._adapters is None else self._adapters.merge(self._name, tensor)


def _load(
    bridge: Bridge, chunks: Sequence[nn.Module], checkpoint: Checkpoint, read: set[str], report: Callable[[int], None]
) -> str | None:
    """Load the weights and add the names of the tensors to `read`. Return what failed."""

    def record(name: str, tensor: LazyTensor) -> tuple[str, LazyTensor]:
        return name, _RecordedTensor(name, tensor, read, report, checkpoint.adapters)

    try:
        with hidden_stderr():
            bridge.load_weights(list(chunks), str(checkpoint.path), converter=record)
    except KeyError as error:
        return f"no safetensors file has the tensor {error.args[0]}, which the model needs"
    except Exception as error:  # of any kind: the other ranks must raise it, too
        return f"the weights can't be read ({type(error).__name__}: {error})"
    return None


def _describe_unfilled(parameters: dict[str, nn.Parameter]) -> str | None:
    """Name the parameters that still hold the NaN from before the load, or other values that are not finite."""
    not_finite = [name for name, parameter in parameters.items() if not bool(parameter.detach().isfinite().all())]
    unfilled = [name for name in not_finite if bool(parameters[name].detach().isnan().all())]
    if unfilled:
        return f"no tensor fills the model's {_shorten(unfilled)} in rank {dist.get_rank()}"
    if not_finite:
        return f"NaN or infinite values in the weights: the model's {_shorten(not_finite)} in rank {dist.get_rank()}"
    return None


def _unused_everywhere(names: Sequence[str], read: set[str]) -> list[str]:
    """Return the `names` that no rank of the world has read. All ranks must call it, with the same names."""
    used = torch.tensor([name in read for name in names], dtype=torch.int32, device=portability.device())
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    return [name for name, is_used in zip(names, used.tolist(), strict=True) if not is_used]


def _describe_unused(unused: Sequence[str], checkpoint: Checkpoint) -> str | None:
    tensors = checkpoint.tensors
    if checkpoint.config.tie_word_embeddings and HEAD in unused:
        unused = [name for name in unused if name != HEAD]
        if not _are_equal(checkpoint.path, tensors[HEAD], tensors[EMBEDDING]):
            return (
                f"{tensors[HEAD].file}: {HEAD} differs from {EMBEDDING}, but config.json has tie_word_embeddings = "
                "true; set it to false, or remove the tensor"
            )
    if unused:
        return f"{tensors[unused[0]].file}: the model has no parameter for {_shorten(unused)}"
    return None


def _are_equal(path: Path, head: StoredTensor, embedding: StoredTensor) -> bool:
    with (
        safe_open(path / head.file, framework="pt") as head_file,
        safe_open(path / embedding.file, framework="pt") as embedding_file,
    ):
        heads, embeddings = head_file.get_slice(HEAD), embedding_file.get_slice(EMBEDDING)
        rows = range(0, head.shape[0], _COMPARED_ROWS)
        return all(
            torch.equal(heads[row : row + _COMPARED_ROWS], embeddings[row : row + _COMPARED_ROWS]) for row in rows
        )


def _shorten(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
