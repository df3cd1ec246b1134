"""Read the headers of a checkpoint's safetensors files, and compare them with config.json."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_gkd.checkpoint_format.config_file import CheckpointProblem, head_dim, is_tied
from megatron_gkd.checkpoint_format.config_values import (
    expert_size,
    has_experts_in,
    num_experts,
    num_key_value_heads,
    text_config,
)
from megatron_gkd.checkpoint_format.families import PlainLayers, family_of
from megatron_gkd.checkpoint_format.quantization import (
    PACKED_BLOCKS,
    PACKED_SCALES,
    block_size,
    is_scale,
    wrong_numbers,
)
from megatron_gkd.checkpoint_format.stored_tensor import Shape, StoredTensor

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"  # the one file of a checkpoint without an index
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
EMBEDDINGS = ".embed_tokens.weight"  # multimodal models have more before it than EMBEDDING
_TIED = "; or does config.json lack tie_word_embeddings = true?"
_NO_PARAMETER = "rotary_emb.inv_freq"  # a buffer that old releases of transformers saved
_BUFFERS = ("e_score_correction_bias", "expert_bias")
_MOST_NAMES = 3


def has_weights(folder: Path) -> bool:
    """Return whether there are safetensors files in a folder, or an index of them."""
    return any(folder.glob("*.safetensors")) or (folder / INDEX).exists()


def read_tensors(folder: Path, config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Return the parameters in the safetensors files, by name.

    Args:
        folder: the checkpoint.
        config: of `read_config`.

    Raises:
        CheckpointProblem: a file is missing, damaged or not part of the checkpoint, or the tensors are not those of
            `config`: exactly in names, shapes and kind of number for families with plain layers; for others only the
            embedding and the kinds of number are compared here, the rest when a model is loaded.
    """
    family = family_of(config)
    stored = {
        name: one
        for name, one in _read_headers(folder).items()
        if not name.endswith(_NO_PARAMETER) and not family.is_unread(name, config)
    }
    for problem in _problems(stored, config):
        raise CheckpointProblem(problem)
    return stored


def head_name(names: Iterable[str]) -> str | None:
    """Return the name of the LM head, None if there is none; `names`: of a checkpoint's tensors."""
    return next((name for name in names if name.endswith(HEAD)), None)


def embedding_name(names: Iterable[str]) -> str:
    """Return the name of the embedding of tokens; `names`: of a checkpoint's tensors."""
    return next(name for name in names if name.endswith(EMBEDDINGS))


def expected_shapes(config: Mapping[str, Any]) -> dict[str, Shape] | None:
    """Return the shape of every parameter that `config` describes, the LM head of an untied model included.

    Returns:
        None for a family whose layers have other tensors than Llama's.
    """
    layers = family_of(config).layers
    if layers is None:
        return None
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, Shape] = {EMBEDDING: (vocabulary, hidden), "model.norm.weight": (hidden,)}
    if not is_tied(config):
        shapes[HEAD] = (vocabulary, hidden)
    kinds = {flag: dict(_layer_shapes(config, layers, flag)) for flag in (False, True)}
    for index, flag in enumerate(has_experts_in(config)):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in kinds[flag].items()}
    return shapes


def count_parameters(tensors: Mapping[str, StoredTensor], *, is_tied: bool) -> int:
    """Return the number of a model's parameters; a head that is the embedding counts once.

    Args:
        tensors: of `read_tensors`.
        is_tied: whether the head is the embedding.
    """
    numbers = 0
    for name, tensor in tensors.items():
        if (is_tied and name.endswith(HEAD)) or name.endswith((*_BUFFERS, PACKED_SCALES)) or is_scale(name):
            continue
        numbers += math.prod(tensor.shape) * (2 if name.endswith(PACKED_BLOCKS) else 1)
    return numbers


def _layer_shapes(config: Mapping[str, Any], layers: PlainLayers, is_mixture: bool) -> Iterator[tuple[str, Shape]]:
    hidden, size = config["hidden_size"], head_dim(config)
    queries, keys = config["num_attention_heads"] * size, num_key_value_heads(config) * size
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield f"self_attn.{name}.weight", (rows, hidden)
        if layers.has_qkv_bias:
            yield f"self_attn.{name}.bias", (rows,)
    yield "self_attn.o_proj.weight", (hidden, queries)
    if layers.has_qk_norm:
        yield "self_attn.q_norm.weight", (size,)
        yield "self_attn.k_norm.weight", (size,)
    if not is_mixture:
        if "intermediate_size" in config:
            yield from _feed_forward("mlp", hidden, config["intermediate_size"])
        return
    experts = num_experts(config)
    yield "mlp.gate.weight", (experts, hidden)
    for expert in range(experts):
        yield from _feed_forward(f"mlp.experts.{expert}", hidden, expert_size(config))


def _feed_forward(prefix: str, hidden: int, inner: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}.gate_proj.weight", (inner, hidden)
    yield f"{prefix}.up_proj.weight", (inner, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, inner)


def _problems(stored: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Iterator[str]:
    yield from wrong_numbers(stored, config)
    rows = text_config(config)["vocab_size"]
    for name in sorted(stored, key=lambda name: name.endswith(HEAD)):
        if name.endswith((EMBEDDINGS, HEAD)):
            found = stored[name]
            if found.shape[:1] != (rows,):
                yield f"{found.file}: {name} has the shape {found.shape}, but config.json has vocab_size = {rows}"
    if not is_tied(config) and head_name(stored) is None and family_of(config).layers is None:
        yield f"no safetensors file has {HEAD}, which config.json requires{_TIED}"
    expected = expected_shapes(config)
    if expected is not None:
        has_scales = block_size(config) is not None
        unscaled = {name: one for name, one in stored.items() if not (has_scales and is_scale(name))}
        yield from _other_tensors(unscaled, expected, config)


def _other_tensors(
    stored: Mapping[str, StoredTensor], expected: Mapping[str, Shape], config: Mapping[str, Any]
) -> Iterator[str]:
    optional = {HEAD: expected[EMBEDDING]} if is_tied(config) else {}
    missing = [name for name in expected if name not in stored]
    if missing:
        hint = _TIED if missing == [HEAD] else ""
        yield f"no safetensors file has {shorten(missing)}, which config.json requires{hint}"
    extra = [name for name in stored if name not in expected and name not in optional]
    if extra:
        layers = f"num_hidden_layers = {config['num_hidden_layers']}"
        yield f"{stored[extra[0]].file}: {shorten(extra)}: config.json has no use for it ({layers})"
    for name, shape in ({**expected, **optional}).items():
        found = stored.get(name)
        if found is not None and found.shape != shape:
            yield f"{found.file}: {name} has the shape {found.shape}; must be {shape} by config.json"


def shorten(names: Sequence[str]) -> str:
    """Return the first names of tensors and the number of the others, for a message."""
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
