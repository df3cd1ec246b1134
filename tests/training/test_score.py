"""What `score` writes under one layout trains under any other, in the model's place; a run that is killed goes on."""

from __future__ import annotations

import functools
import signal
import threading
import time

import pytest
from checkpoints import tiny_checkpoint, tiny_tokenizer
from layouts import DENSE, MOE
from rows import RandomRows
from teachers.fake_server import FakeServer
from training.test_layouts import OBJECTIVES, assert_equal_runs, models
from training_layouts import build, recipe_of, train_steps
from world import World

from megatron_gkd.config.schema import TeacherSection
from megatron_gkd.errors import UserError

K = 9  # more than the objectives take


class SomeRows:
    """Those rows of `RandomRows(count=24)` whose number is in `numbers`, and each of them twice."""

    def __init__(self, numbers):
        self.rows, self.numbers = RandomRows(count=24), [*numbers, *numbers]
        self.lengths, self.num_labels = self.rows.lengths[self.numbers], self.rows.num_labels[self.numbers]

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        from dataclasses import replace

        return replace(self.rows[self.numbers[index]], row_id=int(index))


def write(rank, world_size, student, teacher, changes, folder, k=K, numbers=range(24), shard_rows=5):
    """What `megatron-gkd score` does, of random rows in another order than they are trained on."""
    from megatron_gkd.checkpoint_format.cache_manifest import Manifest
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh
    from megatron_gkd.training.build_teacher import build_teacher
    from megatron_gkd.training.score import Scorer, write_cache

    recipe = recipe_of(changes)
    mesh = initialize_mesh(Layout.from_section(recipe.parallel), recipe.train.seed)
    checkpoints = {"teacher": Checkpoint.open(str(teacher))}
    source = build_teacher(recipe, mesh, Checkpoint.open(str(student)), checkpoints)
    manifest = Manifest(k, recipe.distill.temperature, "t", str(teacher), vocab_size=99)
    write_cache(folder, Scorer(recipe, mesh, SomeRows(numbers), source, manifest, 0), shard_rows)
    destroy_mesh()


def cached(changes: dict, folder, **distill) -> dict:
    teacher = {"teacher_model": None, "teacher_cache": str(folder)}
    return changes | {"teacher": teacher, "distill": changes.get("distill", {}) | distill}


@pytest.fixture(scope="module")
def caches(gloo_world, tmp_path_factory):
    """The folder of a cache that was written under the layout of that name."""

    @functools.cache
    def under(name: str, k: int = K):
        folder = tmp_path_factory.mktemp("cache")
        world_size, changes = DENSE[name]
        gloo_world(world_size).run(write, *models("dense"), changes, folder, k)
        return folder

    return under


@pytest.fixture(scope="module")
def live(gloo_world):
    """One process, with the teacher itself."""

    @functools.cache
    def of(name: str):
        return gloo_world(1).run(train_steps, *models("dense"), {"distill": OBJECTIVES.get(name, {})})[0]

    return of


@pytest.mark.parametrize("name", ["top-k, renormalize", "top-k, bucket"])
@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("micro batch 2", "TP2+SP"),
        ("micro batch 2", "PP2"),
        ("micro batch 2", "TP2+SPxCP2"),
        ("CP2xDP2, packed", "packed"),
        ("TP2xPP2", "CP2"),
    ],
)
def test_any_layout_reads_what_any_other_has_written(written, read, name, gloo_world, caches, live):
    world_size, changes = DENSE[read]
    changes = cached(changes, caches(written), **OBJECTIVES[name])
    found = gloo_world(world_size).run(train_steps, models("dense")[0], None, changes)[0]
    assert_equal_runs(found, live(name))


def test_a_cache_of_the_whole_vocabulary_gives_the_metrics_of_the_live_teacher(gloo_world, caches, live):
    world_size, changes = DENSE["TP2+SP, packed"]
    changes = cached(changes, caches("DP2", k=99))
    found = gloo_world(world_size).run(train_steps, models("dense")[0], None, changes)[0]
    assert found[0]["totals"]["top1_agreement"] == live("")[0]["totals"]["top1_agreement"]
    assert_equal_runs(found, live(""))


@pytest.mark.parametrize(
    ("kind", "layout"), [("dense", "TP2+SPxCP2"), ("dense", "DP2"), ("dense", "PP2"), ("mixture teaches", "EP2")]
)
def test_the_fallback_scores_rows_that_are_missing_in_the_cache(kind, layout, gloo_world, tmp_path):
    """Replicas miss unlike many, some microbatches none."""
    student, teacher = models(kind)
    objective = {"distill": OBJECTIVES["top-k, renormalize"]}
    expected = gloo_world(1).run(train_steps, student, teacher, objective)[0]
    gloo_world(1).run(write, student, teacher, {}, tmp_path, numbers=range(0, 24, 3))
    world_size, changes = (DENSE if kind == "dense" else MOE)[layout]
    changes = changes | objective | {"teacher": {"teacher_cache": str(tmp_path)}}
    found = gloo_world(world_size).run(train_steps, student, teacher, changes)[0]
    assert_equal_runs(found, expected)


def test_server_scores_are_cached_too(gloo_world, live, tmp_path):
    student, teacher = models("dense")
    name = "top-k, renormalize"
    with FakeServer(teacher) as server:
        served = {"teacher": {"teacher_model": None, "teacher_model_server": [server.url]}, "distill": OBJECTIVES[name]}
        gloo_world(1).run(write, student, teacher, served, tmp_path, k=7)
    found = gloo_world(1).run(train_steps, student, None, cached({}, tmp_path, **OBJECTIVES[name]))[0]
    assert_equal_runs(found, live(name), tolerance=1e-4)


def test_a_cache_of_another_tokenizer_is_refused(gloo_world, caches):
    section = TeacherSection(teacher_cache=str(caches("micro batch 2")))
    with pytest.raises(
        UserError, match=r"teacher\.teacher_cache = .*: its rows are of another tokenizer than the student's"
    ):
        gloo_world(1).run(manifests_of, section)


def manifests_of(rank, world_size, section):
    from megatron_gkd.training.build_teacher import read_manifests

    return read_manifests(section, tiny_tokenizer())


def test_only_the_student_is_loaded(gloo_world, caches):
    changes = cached({}, caches("micro batch 2"), **OBJECTIVES["top-k, bucket"])
    assert gloo_world(1).run(loaded_models, models("dense")[0], changes)[0] == [str(models("dense")[0])]


def loaded_models(rank, world_size, student, changes):
    from megatron_gkd.models.megatron_model import MegatronModel
    from megatron_gkd.runtime.mesh import destroy_mesh

    loaded, load = [], MegatronModel.load

    def record(checkpoint, *arguments, **options):
        loaded.append(str(checkpoint.path))
        return load(checkpoint, *arguments, **options)

    MegatronModel.load = record
    try:
        build(student, None, changes)
    finally:
        MegatronModel.load = load
        destroy_mesh()
    return loaded


def test_a_killed_run_continues_to_the_same_files(tmp_path):
    student = tiny_checkpoint("llama", seed=2, num_hidden_layers=2)
    arguments = (write, student, models("dense")[1], {})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    world = World(1)
    try:
        world.run(*arguments, whole, shard_rows=1)
        runner = threading.Thread(target=_run_until_killed, args=(world, *arguments, broken, 1))
        runner.start()
        deadline = time.monotonic() + 120
        while len(list(broken.glob("*.safetensors"))) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        world.send_signal(signal.SIGKILL)
        runner.join()
        (broken / ".rows-left.safetensors.1").write_bytes(b"half of a file")
        before = {path.name: path.stat().st_mtime_ns for path in broken.glob("*.safetensors")}
        assert 3 <= len(before) < 24, "it was killed in the middle"
        world.run(*arguments, broken, shard_rows=1)
    finally:
        world.close()
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (whole, broken)]
    assert contents[0] == contents[1] and len(contents[0]) == 25
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in broken.iterdir()}.items()


def _run_until_killed(world, function, student, teacher, changes, folder, shard_rows):
    try:
        world.run(function, student, teacher, changes, folder, shard_rows=shard_rows)
    except RuntimeError as error:
        if "died with exit code -9" not in str(error):
            raise


def test_a_folder_with_another_cache_is_refused(gloo_world, caches):
    with pytest.raises(UserError, match="has a teacher cache already, with k = 9 instead of 8; name another folder"):
        gloo_world(1).run(write, *models("dense"), {}, caches("micro batch 2"), 8)
