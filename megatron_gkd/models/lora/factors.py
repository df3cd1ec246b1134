"""Enumerate the factors A and B of a chunk's adapters, with their names in the whole model and their sharding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mcore_bridge.tuners.lora import LoraParallelLinear
from megatron.core.models.gpt import GPTModel

ADAPTER = "default"  # the name that PEFT gives to a model's one adapter


@dataclass(frozen=True)
class Factor:
    """One factor of one adapted layer, or of one of its experts.

    Attributes:
        layer: the adapted layer's name in the whole model.
        kind: A, which the layer's input is multiplied by, or B.
        expert: the expert's number in the whole model; None for a dense layer.
        parameter: this rank's share.
        key: the parameter's name in the chunk's state dict.
        sharded_dim: the dimension that tensor parallelism splits; None if every rank has the whole factor.
        has_halves: whether the rows are those of gate and up, one after the other, each of which is split.
    """

    layer: str
    kind: Literal["A", "B"]
    expert: int | None
    parameter: nn.Parameter
    key: str
    sharded_dim: int | None
    has_halves: bool

    @property
    def name(self) -> str:
        """The factor's name in the whole model."""
        expert = "" if self.expert is None else f".{self.expert}"
        return f"{self.layer}{expert}.lora_{self.kind}"

    def whole_shape(self, tp_size: int) -> list[int]:
        """Return the shape of the whole factor."""
        return [n * tp_size if dim == self.sharded_dim else n for dim, n in enumerate(self.parameter.shape)]

    def shard_of(self, whole: Tensor, tp_rank: int, tp_size: int) -> Tensor:
        """Return this rank's share of the whole factor."""
        if self.sharded_dim is None:
            return whole
        if not self.has_halves:
            return whole.chunk(tp_size, self.sharded_dim)[tp_rank]
        return whole.unflatten(0, (2, tp_size, -1))[:, tp_rank].flatten(0, 1)


def global_name(chunk: GPTModel, name: str) -> str:
    """Return the name in the whole model of a module in `chunk.decoder.layers`, which the chunk numbers from 0."""
    prefix, number, rest = name.removeprefix("decoder.").split(".", 2)
    return f"decoder.{prefix}.{chunk.decoder.layers[int(number)].layer_number - 1}.{rest}"


def lora_modules(chunk: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the adapted layers of a chunk with their names in it: mcore-bridge's, and PEFT's in a vision tower."""
    for name, module in chunk.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def weights_of(linear: nn.Module) -> list[nn.Parameter]:
    """Return the weight of a linear layer, or those of its experts."""
    count = getattr(linear, "num_gemms", None)
    names = ["weight"] if count is None else [f"weight{index}" for index in range(count)]
    return [linear.get_parameter(name) for name in names]


def factors_of(chunks: Sequence[GPTModel], expert_rank: int) -> Iterator[Factor]:
    """Yield all factors on this rank, whose place in the expert-parallel group is `expert_rank`."""
    for chunk in chunks:
        for name, module in lora_modules(chunk):
            yield from _factors(global_name(chunk, name), name, module, expert_rank)


def tower_factors(layer: str, name: str, module: Any) -> Iterator[Factor]:
    """Yield the factors of a layer of a vision tower, which every rank that has the tower has whole.

    Args:
        layer: the layer's name in transformers.
        name: its name in the chunk.
        module: PEFT's.
    """
    factors: dict[Literal["A", "B"], nn.Module] = {"A": module.lora_A[ADAPTER], "B": module.lora_B[ADAPTER]}
    for kind, linear in factors.items():
        (weight,) = weights_of(linear)
        yield Factor(layer, kind, None, weight, f"{name}.lora_{kind}.{ADAPTER}.weight", None, has_halves=False)


def _factors(layer: str, name: str, module: LoraParallelLinear, expert_rank: int) -> Iterator[Factor]:
    linears: dict[Literal["A", "B"], nn.Module] = {"A": module.lora_A[ADAPTER], "B": module.lora_B[ADAPTER]}
    for kind, linear in linears.items():
        sharded_dim = None
        if not module.is_grouped and (kind == "A") == module.is_parallel_a:  # experts' tensor parallelism is 1
            sharded_dim = 1 if kind == "A" else 0
        weights = weights_of(linear)
        for index, weight in enumerate(weights):
            suffix = str(index) if module.is_grouped else ""
            yield Factor(
                layer=layer,
                kind=kind,
                expert=expert_rank * len(weights) + index if module.is_grouped else None,
                parameter=weight,
                key=f"{name}.lora_{kind}.{ADAPTER}.weight{suffix}",
                sharded_dim=sharded_dim,
                has_halves=kind == "B" and name.endswith("linear_fc1"),
            )
