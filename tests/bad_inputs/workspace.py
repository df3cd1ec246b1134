"""A workspace that a run of two steps in one process needs, and ways to spoil it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints import tiny_checkpoint

RECIPE = """\
student:  {model: student}
teacher:  {teacher_model: teacher}
distill:  {beta: 0.5, lmbda: 0.0}
parallel: {tensor_model_parallel_size: 1}
data:     {dataset: [train.jsonl], max_length: 64, dataset_cache_dir: rows}
rollout:  {max_completion_length: 8}
train:    {global_batch_size: 2, train_iters: 2, lr: 1.0e-3, dtype: fp32}
output:   {output_dir: runs/x, save_interval: null}
"""
ROW = {"messages": [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"}]}

Change = Callable[[Path], None]


def write_workspace(folder: Path) -> None:
    """Write a recipe, its rows, and copies of the models."""
    (folder / "recipe.yaml").write_text(RECIPE)
    write_rows(folder, [ROW] * 4)
    for name, seed in (("student", 2), ("teacher", 1)):
        shutil.copytree(tiny_checkpoint("qwen3", seed=seed, num_hidden_layers=2), folder / name)


def write_rows(folder: Path, rows: list[Any], name: str = "train.jsonl") -> None:
    """Write rows as JSON lines."""
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def with_text(name: str, content: str | bytes) -> Change:
    """Return a change that writes a file."""

    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)

    return change


def with_row(*lines: str | dict[str, Any] | list[Any]) -> Change:
    """Return a change that makes these the rows behind a good one; text is written as it is."""
    written = [line if isinstance(line, str) else json.dumps(line) for line in (ROW, *lines)]
    return with_text("train.jsonl", "".join(f"{line}\n" for line in written))


def with_config(model: str = "student", **changes: Any) -> Change:
    """Return a change of keys in a model's config.json; None removes one."""

    def change(folder: Path) -> None:
        path = folder / model / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return change


def with_recipe(old: str, new: str) -> Change:
    """Return a change of a part of the recipe's text."""

    def change(folder: Path) -> None:
        path = folder / "recipe.yaml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


def together(*changes: Change) -> Change:
    """Return all `changes` as one."""

    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change
