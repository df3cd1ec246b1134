"""Real runs on two nodes that do not share a folder: each rank is on a node of its own, with its own working folder."""

from __future__ import annotations

import json
import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

from forked_launch import Launch, printed, run

OPTIONS = ("--dtype", "fp32", "--tensor_model_parallel_size", "1", "--train_iters", "2", "--val_dataset", "[]",
           "--save_interval", "null")  # fmt: skip


@dataclass(frozen=True)
class OwnNode:
    """Move rank 1 to a node of its own, where relative paths are others."""

    folder: Path

    def __call__(self, rank: int) -> None:
        from megatron_gkd.data import build
        from megatron_gkd.runtime import shared_folders

        shared_folders.VISIBLE_WITHIN_S = build.VISIBLE_WITHIN_S = 1.0
        os.environ["LOCAL_RANK"] = "0"
        if rank == 1:
            os.chdir(self.folder)


def launch(folder, *options):
    node = folder / "node1"
    node.mkdir()
    for name in ("recipe.yaml", "train.jsonl"):
        shutil.copy2(folder / name, node / name)
    arguments = ("train", "recipe.yaml", *OPTIONS, *options)
    made = Launch(arguments, 2, folder, folder / "logs", prepare=OwnNode(node), grace=5.0, timeout=120.0)
    return run(made), printed(made)


def test_an_output_folder_that_a_node_has_for_itself_is_named(workspace):
    ended, output = launch(workspace)
    assert ended.codes == {0: 2, 1: 2}, output
    problem = (
        f"rank 1 on {socket.gethostname()}: output.output_dir = runs/x: the node {socket.gethostname()} does not see "
        "the file that rank 0 has written there; must be on a file system that all nodes share"
    )
    assert output.count(problem) == 1 and "Traceback" not in output
    assert json.loads((workspace / "runs/x/exit.json").read_text())["reason"] == problem
    assert sorted(path.name for path in (workspace / "runs/x").iterdir()) == ["exit.json"]
    assert not (workspace / "node1/runs").exists()


def test_a_cache_of_rows_that_a_node_has_for_itself_is_made_there(workspace):
    shared = str(workspace / "runs/x")
    ended, output = launch(workspace, "--output_dir", shared, "--dataset_cache_dir", "rows")
    assert ended.succeeded, output
    here, there = (sorted(path.name for path in (workspace / node / "rows").iterdir()) for node in (".", "node1"))
    assert here == there != []
