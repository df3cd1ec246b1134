"""Read the headers of a checkpoint's safetensors files, and compare them with config.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_gkd.checkpoint_format.config_file import (
    CheckpointProblem,
    architecture,
    head_dim,
    is_tied,
    num_experts,
    num_key_value_heads,
)

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"  # the one file of a checkpoint without an index
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FLOATING = ("BF16", "F16", "F32", "F64")
_NO_PARAMETER = "rotary_emb.inv_freq"  # a buffer that old releases of transformers saved
_MOST_NAMES = 3

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its file describes it. `file` is a name in the checkpoint's folder."""

    file: str
    shape: Shape
    dtype: str


def has_weights(folder: Path) -> bool:
    """Return whether there are safetensors files in a folder, or an index of them."""
    return any(folder.glob("*.safetensors")) or (folder / INDEX).exists()


def read_tensors(folder: Path, config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Return the parameters in the safetensors files, by name.

    Args:
        folder: the checkpoint.
        config: of `read_config`.

    Raises:
        CheckpointProblem: a file is missing, damaged or not part of the checkpoint, or the tensors are not exactly
            those of `config` in names, shapes and kind of number.
    """
    stored = {name: one for name, one in _read_headers(folder).items() if not name.endswith(_NO_PARAMETER)}
    for problem in _problems(stored, config):
        raise CheckpointProblem(problem)
    return stored


def expected_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the shape of every parameter that `config` describes, the LM head of an untied model included."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, Shape] = {EMBEDDING: (vocabulary, hidden), "model.norm.weight": (hidden,)}
    if not is_tied(config):
        shapes[HEAD] = (vocabulary, hidden)
    layer = dict(_layer_shapes(config))
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def _layer_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, size, layout = config["hidden_size"], head_dim(config), architecture(config["model_type"])
    queries, keys = config["num_attention_heads"] * size, num_key_value_heads(config) * size
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield f"self_attn.{name}.weight", (rows, hidden)
        if layout.has_qkv_bias:
            yield f"self_attn.{name}.bias", (rows,)
    yield "self_attn.o_proj.weight", (hidden, queries)
    if layout.has_qk_norm:
        yield "self_attn.q_norm.weight", (size,)
        yield "self_attn.k_norm.weight", (size,)
    experts = num_experts(config)
    if not experts:
        yield from _feed_forward("mlp", hidden, config["intermediate_size"])
        return
    yield "mlp.gate.weight", (experts, hidden)
    for expert in range(experts):
        yield from _feed_forward(f"mlp.experts.{expert}", hidden, config["moe_intermediate_size"])


def _feed_forward(prefix: str, hidden: int, inner: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}.gate_proj.weight", (inner, hidden)
    yield f"{prefix}.up_proj.weight", (inner, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, inner)


def _problems(stored: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Iterator[str]:
    quantized = [name for name, one in stored.items() if one.dtype not in _FLOATING]
    if quantized:
        one = stored[quantized[0]]
        yield f"{one.file}: {quantized[0]} is of type {one.dtype}; must be one of {', '.join(_FLOATING)}"
    expected = expected_shapes(config)
    optional = {HEAD: expected[EMBEDDING]} if is_tied(config) else {}
    for name in (EMBEDDING, HEAD):
        found = stored.get(name)
        if found is not None and found.shape[:1] != (config["vocab_size"],):
            rows = config["vocab_size"]
            yield f"{found.file}: {name} has the shape {found.shape}, but config.json has vocab_size = {rows}"
    missing = [name for name in expected if name not in stored]
    if missing:
        tied = "; or does config.json lack tie_word_embeddings = true?" if missing == [HEAD] else ""
        yield f"no safetensors file has {_shorten(missing)}, which config.json requires{tied}"
    extra = [name for name in stored if name not in expected and name not in optional]
    if extra:
        layers = f"num_hidden_layers = {config['num_hidden_layers']}"
        yield f"{stored[extra[0]].file}: {_shorten(extra)}: config.json has no use for it ({layers})"
    for name, shape in (expected | optional).items():
        found = stored.get(name)
        if found is not None and found.shape != shape:
            yield f"{found.file}: {name} has the shape {found.shape}; must be {shape} by config.json"


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more tensors" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _read_headers(folder: Path) -> dict[str, StoredTensor]:
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    index = _read_index(folder)
    if not files and index is None:
        raise CheckpointProblem(f"no *.safetensors file in {folder}")
    used = {WHOLE} if index is None else set(index.values())
    for name in sorted(used - set(files)):
        source = f"its only files are {', '.join(files)}, without {INDEX}" if index is None else f"{INDEX} names it"
        raise CheckpointProblem(f"{name}: no such file in {folder}; {source}")
    for name in sorted(set(files) - used):
        raise CheckpointProblem(f"{name}: not part of the checkpoint by {INDEX if index else WHOLE}; move it elsewhere")
    stored: dict[str, StoredTensor] = {}
    for name in sorted(used):
        tensors = _read_header(folder / name)
        for tensor in tensors:
            if index is not None and index.get(tensor) != name:
                raise CheckpointProblem(
                    f"{name}: {tensor} is in it, but {INDEX} has {index.get(tensor, 'no file')} for it"
                )
        stored |= tensors
    for tensor in sorted((index or {}).keys() - stored.keys()):
        raise CheckpointProblem(f"{(index or {})[tensor]}: {tensor} is not in it, but {INDEX} names this file for it")
    return stored


def _read_index(folder: Path) -> dict[str, str] | None:
    path = folder / INDEX
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if found and all(isinstance(file, str) for file in found.values()):
            return found
        raise TypeError("weight_map is not a JSON object of file names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointProblem(f"{INDEX}: not an index of safetensors files ({error!r})") from error


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}
            return {
                name: StoredTensor(path.name, tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise CheckpointProblem(
            f"{path.name}: not a whole safetensors file of {path.stat().st_size} bytes ({error}); download it again"
        ) from error
