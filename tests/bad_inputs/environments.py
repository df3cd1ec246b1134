"""Bad environments: launchers' variables, folders."""

from __future__ import annotations

import json
from pathlib import Path

from bad_inputs.case import Case
from bad_inputs.workspace import with_recipe, with_text


def ranks(**changes: str) -> dict[str, str]:
    """Return the variables of a launcher, with changes."""
    right = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29581"}
    return right | changes


def _output_is_a_file(folder: Path) -> None:
    (folder / "runs").mkdir()
    (folder / "runs/x").write_text("not a folder")


def _locked(folder: Path) -> None:
    """Make the lock of a run that this machine has no process of, but another machine has."""
    (folder / "runs/x").mkdir(parents=True)
    lock = {"host": "elsewhere", "process": 1}
    (folder / "runs/x/run.lock").write_text(json.dumps(lock))


CASES = [
    Case("WORLD_SIZE as text", "WORLD_SIZE", variables=ranks(WORLD_SIZE="two")),
    Case("WORLD_SIZE of 0", "WORLD_SIZE", variables=ranks(WORLD_SIZE="0")),
    Case("empty WORLD_SIZE", "WORLD_SIZE", variables=ranks(WORLD_SIZE="")),
    Case("RANK as text", "RANK", variables=ranks(RANK="first")),
    Case("RANK beyond the world", "RANK", variables=ranks(RANK="5")),
    Case("negative RANK", "RANK", variables=ranks(RANK="-1")),
    Case("RANK alone", "WORLD_SIZE", variables={"RANK": "0"}),
    Case("WORLD_SIZE alone", "RANK", variables={"WORLD_SIZE": "2"}),
    Case("LOCAL_RANK as text", "LOCAL_RANK", variables=ranks(LOCAL_RANK="x")),
    Case("MASTER_PORT as text", "MASTER_PORT", variables=ranks(MASTER_PORT="port")),
    Case("MASTER_PORT of 0", "MASTER_PORT", variables=ranks(MASTER_PORT="0")),
    Case("MASTER_PORT too large", "MASTER_PORT", variables=ranks(MASTER_PORT="99999")),
    Case("output_dir that is a file", "output.output_dir = runs/x", _output_is_a_file),
    Case("output_dir below /proc", "output.output_dir = /proc/x", with_recipe("runs/x", "/proc/x")),
    Case("output_dir with a long name", "output.output_dir", with_recipe("runs/x", "runs/" + "x" * 300)),
    Case(
        "cache below /proc",
        "data.dataset_cache_dir",
        with_recipe("dataset_cache_dir: rows", "dataset_cache_dir: /proc/rows"),
    ),
    Case(
        "cache with a long name",
        "data.dataset_cache_dir",
        with_recipe("dataset_cache_dir: rows", "dataset_cache_dir: " + "x" * 300),
    ),
    Case("model with a long name", "student.model", with_recipe("model: student", "model: " + "x" * 300)),
    Case("device without a GPU", "attention_backend", with_recipe("dtype: fp32", "attention_backend: flash")),
    Case(
        "checkpoints that are a file",
        "runs/x/checkpoints",
        with_text("runs/x/checkpoints", "x"),
        arguments=("--save_interval", "1"),
    ),
]
