"""A student with more ids than its teacher: neither rows nor samples have an id that the teacher can't read."""

from __future__ import annotations

import contextlib
import json

import pytest
from checkpoints import tiny_checkpoint
from rows import RandomRows
from training_layouts import build, recipe_of

IDS = 30
"""Of the teacher; the student has 99, and their tokenizer 68."""


def models():
    student = tiny_checkpoint("qwen3", seed=2, num_hidden_layers=2)
    return student, tiny_checkpoint("qwen3", seed=1, num_hidden_layers=2, vocab_size=IDS)


@contextlib.contextmanager
def opened(data, tmp_path):
    """A recipe over the rows in `data`, its mesh and its models."""
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh
    from megatron_gkd.training.setup import open_models

    student, teacher = models()
    recipe = recipe_of(
        {
            "student": {"model": str(student)},
            "teacher": {"teacher_model": str(teacher)},
            "data": {"dataset": [str(data)], "dataset_cache_dir": str(tmp_path / "cache")},
        }
    )
    mesh = initialize_mesh(Layout.from_section(recipe.parallel), seed=1)
    try:
        yield recipe, mesh, open_models(recipe, mesh)
    finally:
        destroy_mesh()


def open_the_rows(rank, world_size, data, tmp_path):
    """What is said about them; None if they are taken."""
    from megatron_gkd.errors import GkdError
    from megatron_gkd.training.setup import open_rows

    with opened(data, tmp_path) as (recipe, _mesh, found):
        try:
            open_rows(recipe, found, "train")
        except GkdError as error:
            return str(error)


@pytest.mark.parametrize(
    ("row", "foreign"),
    [
        ({"prompt_token_ids": [4, 5], "response_token_ids": [6, 30]}, "30 ('w26')"),
        ({"prompt_token_ids": [98, 5], "response_token_ids": [6, 7]}, "98"),
        ({"prompt": "w1 w2", "response": "w3 w59"}, "63 ('w59')"),
        ({"prompt": "w1 w40", "response": "w3 w5"}, "44 ('w40')"),
        ({"prompt": "w1", "teacher_prompt": "w40", "response": "w3 w5"}, "44 ('w40')"),
        ({"prompt": "w1 w25", "response": "w3 w5"}, None),
    ],
)
def test_rows_with_ids_that_the_teacher_lacks_are_refused_by_file_and_line(row, foreign, gloo_world, tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": "w1", "response": "w2"}, row]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (message,) = gloo_world(1).run(open_the_rows, data, tmp_path)
    expected = f"{data}, line 2: foreign token id: {foreign} is none of the ids that all models of the run have"
    assert message is None if foreign is None else message.startswith(f"{expected}, which are 0 to {IDS - 1}")


def pad_token_of(rank, world_size, data, tmp_path):
    from megatron_gkd.training.setup import pad_token_id

    with opened(data, tmp_path) as (_, _, found):
        found.tokenizer.pad_token = "w50"
        return pad_token_id(found)


def test_padding_is_an_id_that_all_models_can_read(gloo_world, tmp_path):
    assert gloo_world(1).run(pad_token_of, "unused.jsonl", tmp_path) == [0]


def sample_and_train(rank, world_size, parallel):
    """The ids that are drawn in a step, and the log-probabilities of the engine and of the trainer."""
    from megatron_gkd.data.batch_config import BatchConfig
    from megatron_gkd.data.lambda_schedule import LambdaSchedule
    from megatron_gkd.data.order import SampleOrder
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.training.assemble import build_rollouts
    from megatron_gkd.training.ends import CompletionEnds
    from megatron_gkd.training.prepare import PreparedRun
    from megatron_gkd.training.setup import Models
    from megatron_gkd.training.training_rows import TrainingRows

    changes = {"parallel": parallel, "distill": {"lmbda": 1.0}}
    rows = RandomRows(count=8, vocab_size=IDS)
    recipe = recipe_of(changes)
    short = recipe.rollout.model_copy(update={"max_completion_length": 20})
    recipe = recipe.model_copy(update={"rollout": short})
    mesh, student, teacher, _ = build(*models(), changes, rows)
    prepared = PreparedRun(
        point=None,
        models=Models(student.model.checkpoint, {}, student.model.checkpoint.tokenizer(), IDS),
        vocab_size=IDS,
        training=TrainingRows(rows, SampleOrder(rows.sizes, [1.0], seed=1234, shuffle=True)),
        validation=None,
        lines=(),
        epochs=1.0,
        has_images=False,
        batch_config=BatchConfig.from_recipe(recipe, mesh, pad_token_id=0),
        lambda_schedule=LambdaSchedule(1.0, "step", seed=7),
        ends=CompletionEnds(tuple(student.model.checkpoint.eos_token_ids)),
        train_iters=3,
        identity={},
    )
    rollouts = build_rollouts(recipe, mesh, prepared, student, teacher)
    rollouts.load_weights(student, 0)
    microbatches, report = rollouts.microbatches(1)
    with teacher.resident():
        signals = teacher.score(microbatches)
    totals = student.compute_gradients(microbatches, signals)
    destroy_mesh()
    drawn = {token for row in report.sampled.values() for token in row.completion.token_ids}
    return drawn, report.log_prob, -totals["student_cross_entropy"]


@pytest.mark.parametrize("size", [1, 2])
def test_samples_are_of_ids_that_the_teacher_has(size, gloo_world):
    for drawn, by_engine, by_trainer in gloo_world(size).run(sample_and_train, {"tensor_model_parallel_size": size}):
        assert max(drawn) < IDS and len(drawn) > 10
        assert by_engine == pytest.approx(by_trainer, rel=1e-5)
