"""What a run opens at its start: on slow disks, on several nodes, and with prompts that fill the sequence."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import tiny_checkpoint, tiny_tokenizer
from training_layouts import recipe_of

SLOW_PLUGIN = """
import time
from megatron_gkd.data import register_preprocessor

@register_preprocessor("slow")
def slow(row):
    time.sleep(2.0)
    return row
"""


@contextlib.contextmanager
def environment(**values):
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def rows_of(rank, data, split="train", all_completed=None, **sections):
    """The rows that `open_rows` gives to this rank, and the counts."""

    from megatron_gkd.training.setup import open_rows

    recipe = recipe_of(sections | {"data": data})
    models = SimpleNamespace(tokenizer=tiny_tokenizer(), vocab_size=68, images=None)
    dataset, report = open_rows(recipe, models, split, all_completed=all_completed)
    return [dataset[row].input_ids.tolist() for row in range(len(dataset))], report.summary()


def open_slowly(rank, world_size, data):
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _set_pg_timeout

    _set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
    try:
        return rows_of(rank, data)
    finally:
        _set_pg_timeout(timedelta(minutes=10), dist.group.WORLD)


def open_on_two_nodes(rank, world_size, data):
    """Each rank is its node's first, with a cache and a copy of the file of its own."""
    import megatron_gkd.data.build

    megatron_gkd.data.build.VISIBLE_WITHIN_S = 0.2
    data = [data | {"dataset": [f"{node}/train.jsonl"], "dataset_cache_dir": f"{node}/cache"} for node in data["nodes"]]
    with environment(LOCAL_RANK="0", GROUP_RANK=str(rank), LOCAL_WORLD_SIZE="1"):
        return rows_of(rank, {name: value for name, value in data[rank].items() if name != "nodes"})


def download_on_two_nodes(rank, world_size, hub, nodes):
    """`hub/models/name` is what there is to download; each node has a cache of its own. The files this rank has."""
    import huggingface_hub

    from megatron_gkd.training.setup import open_models

    downloads = []

    def snapshot_download(model, *, revision=None, allow_patterns=None, local_files_only=False):
        path = Path(nodes[rank]) / model / "snapshots" / "c0ffee"
        assert revision in (None, "c0ffee")
        if local_files_only and not path.is_dir():
            raise FileNotFoundError("an appropriate snapshot folder is not in the cache")
        if not local_files_only:
            downloads.append(model)
            path.mkdir(parents=True, exist_ok=True)
            for file in (Path(hub) / model).iterdir():  # as the hub's client does: each file appears whole, and once
                if not (path / file.name).exists():
                    shutil.copy(file, path / f".incomplete{rank}")
                    (path / f".incomplete{rank}").rename(path / file.name)
        return str(path)

    real, huggingface_hub.snapshot_download = huggingface_hub.snapshot_download, snapshot_download
    recipe = recipe_of({"student": {"model": "models/name"}, "teacher": {"teacher_model": "models/name"}})
    try:
        with environment(LOCAL_RANK="0", GROUP_RANK=str(rank), LOCAL_WORLD_SIZE="1"):
            models = open_models(recipe, SimpleNamespace(is_main=rank == 0))
    finally:
        huggingface_hub.snapshot_download = real
    return str(models.student.path), downloads, sorted(path.name for path in models.student.path.iterdir())


@pytest.fixture
def write(tmp_path):
    def write(rows, name="train.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


ROWS = [{"prompt": f"w{index}", "response": "w1 w2"} for index in range(2)]


def test_ranks_wait_longer_than_a_collective_may_take(gloo_world, write, tmp_path):
    plugin = tmp_path / "plugin.py"
    plugin.write_text(SLOW_PLUGIN)
    data = {"dataset": [str(write(ROWS[:1]))], "preprocessor": "slow", "external_plugins": [str(plugin)]}
    first, second = gloo_world(2).run(open_slowly, data | {"dataset_cache_dir": str(tmp_path / "cache")})
    assert first == second and first[1] == "1 of 1 rows used"


def test_nodes_that_share_nothing_have_the_same_rows(gloo_world, write, tmp_path):
    nodes = [str(tmp_path / f"node{node}") for node in range(2)]
    for node in range(2):
        os.utime(write(ROWS, f"node{node}/train.jsonl"), (node + 1, node + 1))
    first, second = gloo_world(2).run(open_on_two_nodes, {"nodes": nodes})
    assert first == second and len(first[0]) == 2
    caches = [[path.name for path in Path(node, "cache").iterdir()] for node in nodes]
    assert caches[0] == caches[1] and len(caches[0]) == 1


@pytest.mark.parametrize("leftover", [False, True])
def test_every_node_downloads_missing_files(gloo_world, tmp_path, leftover):
    """A leftover of an earlier download that was killed is no model."""
    hub, nodes = tmp_path / "hub", [str(tmp_path / f"node{node}") for node in range(2)]
    shutil.copytree(tiny_checkpoint("qwen3", seed=1), hub / "models/name")
    if leftover:
        path = Path(nodes[1], "models/name/snapshots/c0ffee")
        path.mkdir(parents=True)
        shutil.copy(hub / "models/name/config.json", path)
    answers = gloo_world(2).run(download_on_two_nodes, str(hub), nodes)
    for node, (path, downloads, files) in enumerate(answers):
        assert path.startswith(nodes[node]) and "models/name" in downloads
        assert files == sorted(file.name for file in (hub / "models/name").iterdir())
    assert answers[1][1] == ["models/name"], "downloaded again for the teacher"


def test_a_cache_that_nodes_share_is_filled_once(gloo_world, tmp_path):
    hub, shared = tmp_path / "hub", str(tmp_path / "shared")
    shutil.copytree(tiny_checkpoint("qwen3", seed=1), hub / "models/name")
    answers = gloo_world(2).run(download_on_two_nodes, str(hub), [shared, shared])
    assert answers[0][0] == answers[1][0] and answers[1][1] == []


def alone(rank, world_size, data, options):
    return rows_of(rank, data, **options)


class TestPromptsThatFillTheSequence:
    LONG = ({"prompt_token_ids": [5] * 62, "response_token_ids": [6, 7]},)

    @pytest.fixture
    def count(self, gloo_world, write, tmp_path):
        """How many of the rows are used, with their longest."""

        def count(rows, max_length=64, **options):
            data = {"dataset": [str(write([*rows, *ROWS]))], "max_length": max_length}
            data["val_dataset"] = data["dataset"]
            cache = {"dataset_cache_dir": str(tmp_path / "cache")}
            rows, _ = gloo_world(1).run(alone, data | cache, options)[0]
            return len(rows), max(map(len, rows))

        return count

    def test_rows_that_the_student_may_answer_need_room(self, count):
        assert count(self.LONG) == (3, 64)
        on_policy = {"distill": {"lmbda": 0.5}}
        assert count(self.LONG, **on_policy)[0] == 2
        assert count(self.LONG, **on_policy, split="validation") == (3, 64)
        assert count(self.LONG, all_completed=True)[0] == 2
