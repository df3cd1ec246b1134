"""A damaged checkpoint is named in one line: the run goes on from the one before it, or refuses the one it is to take.

And what loading must refuse or repair although every file is as it was written.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from checkpoints import tiny_checkpoint
from layouts import PP2, TP2
from training_layouts import build, recipe_of, weights_of

from megatron_gkd.errors import RunStopped

PLAIN = {"teacher": {"teacher_kind": "none", "teacher_model": None}, "train": {"dtype": "bf16"}}


def shard_of(path: Path) -> Path:
    return max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def overwrite(file: Path, change) -> None:
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = change(content[middle : middle + 4096])
    file.write_bytes(content)


def flip_one_bit(content: bytes) -> bytes:
    return bytes([content[0] ^ 1, *content[1:]])


SIZE, MISSING, DIGEST = "has {size} bytes; it was written with", "missing", "damaged: its SHA-256 is not the one"
DAMAGES = {
    "shard truncated": (lambda path, other: truncate(shard_of(path)), SIZE),
    "common.pt truncated": (lambda path, other: truncate(path / "common.pt"), SIZE),
    "shard missing": (lambda path, other: shard_of(path).unlink(), MISSING),
    ".metadata missing": (lambda path, other: (path / ".metadata").unlink(), MISSING),
    "metadata.json missing": (lambda path, other: (path / "metadata.json").unlink(), MISSING),
    ".metadata cut": (lambda path, other: truncate(path / ".metadata"), SIZE),
    "common.pt missing": (lambda path, other: (path / "common.pt").unlink(), MISSING),
    "4 KiB of zeros": (lambda path, other: overwrite(shard_of(path), lambda content: bytes(len(content))), DIGEST),
    "one bit flipped": (lambda path, other: overwrite(shard_of(path), flip_one_bit), DIGEST),
    "run.json missing": (lambda path, other: (path / "run.json").unlink(), MISSING),
    "manifest missing": (lambda path, other: (path / "manifest.json").unlink(), "no manifest.json there"),
    "manifest truncated": (lambda path, other: truncate(path / "manifest.json"), "can't be read"),
    "shard of another model": (lambda path, other: shutil.copy(shard_of(other), shard_of(path)), SIZE),
}
"""By name, what is done to the newest checkpoint, and a part of the line about it."""


def save_steps(student, batches, recipe, *, with_optimizer=True):
    """Save each of the steps. Returns the weights after each."""
    from megatron_gkd.training.checkpointing.identity import recipe_identity
    from megatron_gkd.training.checkpointing.resume import checkpoint_folder
    from megatron_gkd.training.checkpointing.saver import Saver
    from megatron_gkd.training.checkpointing.state import Saved

    saver, weights = Saver(checkpoint_folder(recipe), is_asynchronous=False), []
    saved = Saved(student, with_optimizer=with_optimizer)
    for step, microbatches in enumerate(batches, start=1):
        student.compute_gradients(microbatches, [None] * len(microbatches))
        student.update()
        run = {"identity": recipe_identity(recipe), "progress": {"step": step, "updates": step}}
        assert saver.save(step, saved.to_write(), saved.description() | run)
        weights.append(weights_of(student))
    return weights


def recipe_at(model, changes, directory, **train):
    changes = changes | {"student": {"model": str(model)}, "output": {"output_dir": str(directory)}}
    return recipe_of(changes | {"train": changes["train"] | train})


def are_equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def refused(work) -> str | None:
    try:
        work()
    except RunStopped as error:
        return str(error)
    return None


def damage_and_resume(rank, world_size, model, other, directory):
    """Save steps 1 to 3 of a run, and of another model's; damage step 3 and resume, by its path and automatically."""
    import torch.distributed as dist

    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.training.checkpointing.loader import load
    from megatron_gkd.training.checkpointing.resume import find_resume_point
    from megatron_gkd.training.checkpointing.state import Saved

    changes = PLAIN | {"parallel": TP2}
    _, student, _, batches = build(other, None, changes)
    save_steps(student, batches, recipe_at(other, changes, directory / "other"))
    destroy_mesh()
    _, student, _, batches = build(model, None, changes)
    weights = save_steps(student, batches, recipe_at(model, changes, directory / "run"))
    seen = {}
    for name, (damage, _) in DAMAGES.items():
        output_dir = directory / name
        newest = output_dir / "checkpoints/step-000003"
        if rank == 0:
            shutil.copytree(directory / "run", output_dir, symlinks=True)
            damage(newest, directory / "other/checkpoints/step-000003")
        dist.barrier()
        recipe = recipe_at(model, changes, output_dir, resume=str(newest))
        refusal = refused(lambda recipe=recipe: find_resume_point(recipe))
        point = find_resume_point(recipe_at(model, changes, output_dir))
        load(Saved(student), point.path, point.step)
        seen[name] = refusal, point.step, point.warnings, are_equal(weights_of(student), weights[1])
    whole_other = directory / "other/checkpoints/step-000003"
    foreign = refused(lambda: load(Saved(student), whole_other, 3))
    destroy_mesh()
    return seen, foreign


def test_each_damage(gloo_world, tmp_path):
    model = tiny_checkpoint("qwen3", seed=2, num_hidden_layers=2)
    other = tiny_checkpoint("qwen3", seed=3, num_hidden_layers=2, hidden_size=48)
    for seen, foreign in gloo_world(2).run(damage_and_resume, model, other, tmp_path):
        assert seen.keys() == DAMAGES.keys()
        for name, (refusal, step, warnings, is_older) in seen.items():
            newest = tmp_path / name / "checkpoints/step-000003"
            assert refusal.startswith("train.resume = ")
            for line in (refusal.partition(": ")[2], *warnings):
                assert line.startswith(str(newest)) and "\n" not in line, name
                start, _, end = DAMAGES[name][1].partition("{size}")
                assert start in line and end in line, name
            assert step == 2 and len(warnings) == 1 and is_older, name
        assert foreign.startswith(str(tmp_path / "other/checkpoints/step-000003: can't be loaded into this model"))
        assert "\n" not in foreign


def resume_without_optimizer(rank, world_size, model, directory):
    """Save steps without their optimizer; resume, which is refused, and start a new run from the weights."""
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.training.checkpointing.loader import load_weights
    from megatron_gkd.training.checkpointing.resume import find_checkpoint, find_resume_point
    from megatron_gkd.training.checkpointing.state import Saved

    _, student, _, batches = build(model, None, PLAIN | {"parallel": TP2})
    recipe = recipe_at(model, PLAIN, directory)
    expected = save_steps(student, batches, recipe, with_optimizer=False)[-1]
    destroy_mesh()
    refusals = [refused(lambda: find_resume_point(recipe))]
    recipe = recipe_at(model, PLAIN, directory, resume=str(directory / "checkpoints/step-000001"))
    refusals.append(refused(lambda: find_resume_point(recipe)))
    _, student, _, batches = build(model, None, PLAIN | {"parallel": PP2})
    load_weights(Saved(student), find_checkpoint(str(directory), "train.init_from"))
    found = weights_of(student)
    microbatches = next(iter(batches))
    student.compute_gradients(microbatches, [None] * len(microbatches))
    student.update()  # from the master weights, which must be the loaded ones
    largest = max((weights_of(student)[name].float() - found[name].float()).abs().max().item() for name in found)
    destroy_mesh()
    return refusals, are_equal(found, expected), largest


def test_without_the_optimizer_a_new_run_starts_from_the_weights(gloo_world, tmp_path):
    model = tiny_checkpoint("qwen3_tied", seed=2, num_hidden_layers=2)
    for refusals, is_equal, largest in gloo_world(2).run(resume_without_optimizer, model, tmp_path):
        for refusal, step in zip(refusals, (3, 1), strict=True):
            assert f"step-00000{step} has no optimizer state" in refusal and "train.init_from" in refusal
            assert "\n" not in refusal
        assert is_equal and 0 < largest < 0.1


def resume_with_and_without_padding(rank, world_size, model, directory):
    """Save a student whose buffers have several padded buckets, with Megatron's own gathering, and with the repair."""
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.training.checkpointing import workarounds
    from megatron_gkd.training.checkpointing.loader import load
    from megatron_gkd.training.checkpointing.state import Saved

    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    def states_of(student):
        states = [state[name].clone() for _, state in workarounds.adam_states(student.optimizer) for name in state]
        return states + [p.detach().clone() for group in student.optimizer.param_groups for p in group["params"]]

    changes = PLAIN | {"parallel": PP2}
    results, name = {}, "sharded_param_state_fully_reshardable"
    workarounds.apply_workarounds()
    repaired = getattr(DistributedOptimizer, name)
    original = repaired.__wrapped__
    for is_repaired in (False, True):
        setattr(DistributedOptimizer, name, repaired if is_repaired else original)
        output_dir = directory / str(is_repaired)
        _, student, _, batches = build(model, None, changes)
        buckets = [
            [b.numel_unpadded % 128 for b in buffer.buckets] for chunk in student.chunks for buffer in chunk.buffers
        ]
        save_steps(student, batches, recipe_at(model, changes, output_dir))
        expected = states_of(student)
        destroy_mesh()
        _, student, _, _ = build(model, None, changes)
        load(Saved(student), output_dir / "checkpoints/step-000003", 3)
        pairs = zip(states_of(student), expected, strict=True)
        results[is_repaired] = max((a.float() - b.float()).abs().max().item() for a, b in pairs)
        destroy_mesh()
    setattr(DistributedOptimizer, name, repaired)
    return results, buckets


def test_the_padding_between_buckets(gloo_world, tmp_path):
    """Without the repair the moments and master weights that are saved are those of other parameters.

    It is the last stage's: the head, tied to the embedding, has the first bucket there.
    """
    model = tiny_checkpoint("qwen3_tied", seed=2, num_hidden_layers=2)
    (_, first), (results, last) = gloo_world(2).run(resume_with_and_without_padding, model, tmp_path)
    assert [sizes[0] for sizes in first] == [0] and all(len(sizes) == 2 and sizes[0] for sizes in last)
    assert results[True] == 0 and results[False] > 1e-3
