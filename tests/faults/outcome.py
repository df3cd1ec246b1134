"""What two runs of one recipe must have in common, bit by bit, however often one of them was killed."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

TIMES = frozenset(
    {
        "step_time_s",
        "teacher_time_s",
        "tokens_per_second",
        "peak_memory_bytes",
        "rollout_time_s",
        "sync_time_s",
        "rollout_tokens_per_second",
    }
)
"""Keys of a record that differ between any two runs."""


def differences(found: Path, expected: Path) -> list[str]:
    """Compare two output folders. Returns a line for each part that differs."""
    return list(_differences(found, expected))


def _differences(found: Path, expected: Path) -> Iterator[str]:
    yield from _lines("metrics.jsonl", records(found), records(expected))
    yield from _lines("completions.jsonl", *(_text_lines(folder / "completions.jsonl") for folder in (found, expected)))
    yield from _lines("bad_steps", *(_bad_steps(folder) for folder in (found, expected)))
    for path in sorted(expected.glob("*/*.safetensors")):  # in hf, in adapters, or in both
        name = path.relative_to(expected)
        yield from _tensors(str(name), load_file(found / name), load_file(path))
    yield from _lines("checkpoints", *(_names(folder / "checkpoints") for folder in (found, expected)))
    for name in _names(expected / "checkpoints"):
        yield from _checkpoint(found / "checkpoints" / name, expected / "checkpoints" / name)
    yield from _lines("tensorboard", *(events_of(folder / "tensorboard") for folder in (found, expected)))
    yield from _lines("the folder", *(_names(folder) for folder in (found, expected)))
    for path in found.rglob("*.unfinished"):
        yield f"{path}: left behind"


def records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl without times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


def events_of(folder: Path) -> list[tuple[str, int, str]]:
    """Return what TensorBoard shows of the events in a folder: tag, step and number or text, without times."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    for name in ("tensorboard", "tensorflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
    events = EventAccumulator(str(folder), tensor_size_guidance={"scalars": 0, "text": 0})
    events.Reload()
    tags = [tag for tag in sorted(events.Tags()["tensors"]) if tag.rpartition("/")[2] not in TIMES]
    found = [(tag, event) for tag in tags for event in events.Tensors(tag)]
    return [(tag, event.step, str(make_ndarray(event.tensor_proto).tolist())) for tag, event in found]


def tensors_of(checkpoint: Path) -> dict[str, Any]:
    """Return all that a training checkpoint holds, by its keys: weights, moments, averages and random states."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    reader = FileSystemReader(checkpoint)
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    common = torch.load(checkpoint / "common.pt", weights_only=False)
    return dict(_flatten("", state)) | dict(_flatten("common", common))


def _checkpoint(found: Path, expected: Path) -> Iterator[str]:
    if not (found / "manifest.json").is_file():
        return
    yield from _tensors(f"checkpoints/{expected.name}", tensors_of(found), tensors_of(expected))
    runs = [json.loads((path / "run.json").read_text()) for path in (found, expected)]
    yield from _lines(f"checkpoints/{expected.name}/run.json", *(sorted(_flatten("", run)) for run in runs))


def _tensors(name: str, found: dict[str, Any], expected: dict[str, Any]) -> Iterator[str]:
    if found.keys() != expected.keys():
        yield f"{name}: has other keys: {sorted(found.keys() ^ expected.keys())[:3]}"
        return
    other = [key for key, value in expected.items() if not _is_same(found[key], value)]
    if other:
        yield f"{name}: {len(other)} of {len(expected)} differ: {', '.join(other[:3])}"


def _is_same(found: Any, expected: Any) -> bool:
    if torch.is_tensor(expected):
        is_alike = found.dtype == expected.dtype and found.shape == expected.shape
        return is_alike and torch.equal(_bytes(found), _bytes(expected))
    return type(found) is type(expected) and repr(found) == repr(expected)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _lines(name: str, found: list, expected: list) -> Iterator[str]:
    for number, (one, other) in enumerate(zip(found, expected, strict=False), start=1):
        if one != other:
            yield f"{name}, entry {number}: {_unlike(one, other)}"
            return
    if len(found) != len(expected):
        yield f"{name}: {len(found)} entries instead of {len(expected)}"


def _unlike(one: Any, other: Any) -> str:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
        one, other = ({key: record.get(key) for key in sorted(keys)} for record in (one, other))
    return f"{str(one)[:200]} instead of {str(other)[:200]}"


def _text_lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _bad_steps(folder: Path) -> list[tuple[str, str]]:
    return sorted((path.name, path.read_text()) for path in (folder / "bad_steps").glob("*"))


def _names(folder: Path) -> list[str]:
    """Return what is in a folder, without what former runs have left to keep (`metrics.jsonl.1`)."""
    return sorted(path.name for path in folder.iterdir() if not re.search(r"\.\d+$", path.name))


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list | tuple) and not all(isinstance(one, int | float | str) for one in value):
        pairs = enumerate(value)
    else:
        yield prefix, value
        return
    for key, one in pairs:
        yield from _flatten(f"{prefix}.{key}", one)
