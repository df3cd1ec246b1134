"""The folders that a run writes: where they are, and whether they can be written as the run does it."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from megatron_gkd.doctor.checkpoint_size import estimate_bytes
from megatron_gkd.doctor.finding import Check, Finding
from megatron_gkd.doctor.subject import Subject
from megatron_gkd.runtime.disk import publish

_TEMPORARY = ("tmpfs", "ramfs", "overlay")
_MARK = "megatron_gkd_doctor_"
_LEAST_FREE = 2**30


@dataclass(frozen=True)
class Folder:
    """A folder that a run writes.

    Attributes:
        name: of its findings.
        path: the folder, which need not exist.
        key: the recipe's key or the variable that moves it.
        holds_results: whether what is there must outlast the machine.
    """

    name: str
    path: Path
    key: str
    holds_results: bool = False


def folders_of(subject: Subject) -> list[Folder]:
    """Return the folders that a run writes, those of defaults without a recipe."""
    recipe = subject.recipe
    folders = []
    cache = Path.home() / ".cache/megatron_gkd/datasets"
    if recipe is not None:
        output = Path(recipe.output.output_dir)
        folders.append(Folder("output_dir", output, "output.output_dir", holds_results=True))
        cache = Path(recipe.data.dataset_cache_dir or cache)
        if recipe.distill.lmbda > 0 and recipe.rollout.engine == "vllm_server":
            if recipe.rollout.weight_sync in ("folder", "lora"):
                weights = Path(recipe.rollout.weight_sync_dir or output / "rollout_weights")
                folders.append(Folder("weight_sync_dir", weights, "rollout.weight_sync_dir"))
    return [
        *folders,
        Folder("dataset cache", cache, "data.dataset_cache_dir"),
        Folder("hub cache", hub_cache(), "HF_HUB_CACHE"),
    ]


def hub_cache() -> Path:
    """Return the folder of models from the hub, as `huggingface_hub` finds it."""
    home = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    return Path(os.environ.get("HF_HUB_CACHE", os.path.join(home, "hub"))).expanduser()


def checks_of(subject: Subject) -> list[Check]:
    """Return a check for each folder, so that one that hangs holds up no other."""
    return [Check(folder.name, partial(find, folder)) for folder in folders_of(subject)]


def find(folder: Folder, subject: Subject) -> Iterator[Finding]:
    """Write, flush, rename and lock a file where the folder is or will be, and compare its free space."""
    absolute = folder.path.expanduser().absolute()
    parent = next(path for path in (absolute, *absolute.parents) if path.exists())
    kind = file_system_of(parent)
    text = f"{absolute} on {kind}"
    problem = _find_problem(parent)
    if problem is not None:
        yield Finding(folder.name, "failed", f"{text}: {problem}", f"name another folder: {folder.key}")
        return
    free = shutil.disk_usage(parent).free
    text += f", {free / 2**30:.1f} GiB free"
    needed = estimate_bytes(subject.recipe) if folder.holds_results and subject.recipe is not None else None
    if needed is not None:
        text += f"; checkpoints and exports of this recipe take about {needed / 2**30:.1f} GiB"
    if free < (needed or 0):
        remedy = f"name a larger disk ({folder.key}), or lower output.save_total_limit"
        yield Finding(folder.name, "failed", text, remedy)
    elif free < _LEAST_FREE:
        yield Finding(folder.name, "warning", text, f"free some space, or name another folder: {folder.key}")
    elif folder.holds_results and kind in _TEMPORARY:
        remedy = f"name a folder that outlasts the machine or its container: {folder.key}"
        yield Finding(folder.name, "warning", f"{text}: may be gone with the machine or its container", remedy)
    else:
        yield Finding(folder.name, "ok", text)


def _find_problem(parent: Path) -> str | None:
    """Return what goes wrong when a run's operations are made in a folder; None if nothing does."""
    if not parent.is_dir():
        return f"{parent} is a file"
    doing = "make a folder"
    try:
        with tempfile.TemporaryDirectory(prefix=_MARK, dir=parent) as temporary:
            doing = "write a file"
            unfinished, final = Path(temporary) / "unfinished", Path(temporary) / "final"
            unfinished.write_bytes(b"megatron_gkd")
            doing = "flush and rename a file"
            publish(unfinished, final)
            doing = "lock a file"
            with open(final, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            doing = "remove a folder"
    except OSError as error:
        return f"can't {doing}: {error.strerror}"
    return None


def file_system_of(path: Path) -> str:
    """Return the type of the file system of an existing path, such as `ext4` or `nfs4`."""
    resolved = path.resolve()
    mounts = {Path(one.mountpoint): one.fstype for one in psutil.disk_partitions(all=True)}
    return next(
        (mounts[parent] for parent in (resolved, *resolved.parents) if parent in mounts), "an unknown file system"
    )
