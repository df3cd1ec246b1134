"""The parts of a multimodal model: vision tower, aligner and language model, by the names of ms-swift."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from megatron_gkd.config.vision_rules import Part

_VISUAL = "visual."


def language_model(chunk: nn.Module) -> Any:
    """Return the GPTModel in a chunk, which is the chunk itself in a text model. DDP may wrap the chunk."""
    inner = getattr(chunk, "module", chunk)
    return getattr(inner, "language_model", inner)


def visual_of(chunk: nn.Module) -> Any | None:
    """Return the vision tower with its aligner; None after the first chunk, and in a text model."""
    inner = getattr(chunk, "module", chunk)
    return getattr(inner, "visual", None)


def towers(visual: Any) -> Iterator[nn.Module]:
    """Yield the modules of transformers that read pixels."""
    for name in visual._vision_tower:
        yield visual.get_submodule(name)


def named_parts(chunk: nn.Module) -> Iterator[tuple[Part, nn.Parameter]]:
    """Yield every parameter of a chunk with the part that it belongs to; all of a text model are of `llm`."""
    visual = visual_of(chunk)
    aligner = () if visual is None else tuple(f"{_VISUAL}{name}." for name in visual._aligner)
    inner = getattr(chunk, "module", chunk)
    for name, parameter in inner.named_parameters():
        if not name.startswith(_VISUAL):
            yield "llm", parameter
        else:
            yield "aligner" if name.startswith(aligner) else "vit", parameter


def count_parameters_of(
    parts: Collection[Part], visual_class: Any, shapes: Mapping[str, tuple[int, ...]], num_parameters: int
) -> int:
    """Return the number of parameters of some parts of a model.

    Args:
        parts: the parts.
        visual_class: mcore-bridge's class of vision tower and aligner; None for a text model.
        shapes: of all parameters by their names in transformers.
        num_parameters: of the whole model.
    """
    numbers: dict[Part, int] = {"vit": 0, "aligner": 0}
    aligner = () if visual_class is None else tuple(f"{name}." for name in visual_class._aligner)
    for hf_name, own_name in ({} if visual_class is None else visual_class.module_mapping).items():
        for name, shape in shapes.items():
            if name.startswith(f"{hf_name}."):
                is_aligner = (own_name + name.removeprefix(hf_name)).startswith(aligner)
                numbers["aligner" if is_aligner else "vit"] += math.prod(shape)
    numbers["llm"] = num_parameters - sum(numbers.values())
    return sum(numbers[part] for part in parts)


def freeze(chunk: nn.Module, parts: Collection[Part]) -> None:
    """Leave parts of a chunk out of training. Call it before DDP builds its buffers."""
    for part, parameter in named_parts(chunk):
        if part in parts:
            parameter.requires_grad_(False)


def tower_layers(chunk: nn.Module) -> Iterator[tuple[Part, str, str]]:
    """Yield the linear layers of vision tower and aligner: their part, name in the chunk, and name in transformers."""
    visual = visual_of(chunk)
    if visual is None:
        return
    aligner = tuple(f"{name}." for name in visual._aligner)
    for hf_name, own_name in visual.module_mapping.items():
        for name, module in visual.get_submodule(own_name).named_modules(prefix=own_name):
            if isinstance(module, nn.Linear):
                part: Part = "aligner" if f"{name}.".startswith(aligner) else "vit"
                yield part, f"{_VISUAL}{name}", hf_name + name.removeprefix(own_name)
