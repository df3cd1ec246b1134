"""Rows that have teachers of their own: equal under every layout, and to what each teacher makes of its rows alone."""

from __future__ import annotations

import functools

import pytest
from checkpoints import tiny_checkpoint
from layouts import DENSE, MOE
from training.test_layouts import OBJECTIVES, assert_equal_runs
from training.test_one_process import STUDENT, assert_equals_oracle, oracle, teacher_of
from training.test_score import write
from training_layouts import RECIPE, train_steps

from megatron_gkd.errors import UserError
from megatron_gkd.teachers.several import require_teachers

TWO = {
    "teacher_model": None,
    "teacher_tag_key": "subject",
    "teachers": [{"tags": ["a"], "teacher_model": "first"}, {"tags": ["b", "c"], "teacher_model": "second"}],
}


def teachers(first, second):
    return {"teacher.teachers[0]": first, "teacher.teachers[1]": second}


def changes_of(changes):
    return changes | {"teacher": TWO | changes.get("teacher", {}), "distill": RECIPE["distill"] | {"beta": 0.5}}


@functools.cache
def two_of(kind):
    """A small teacher and, where `kind` is a mixture, one whose experts are shared by the ranks."""
    second = {"dense": "llama", "mixture": "qwen3_moe"}[kind]
    return teachers(teacher_of(), tiny_checkpoint(second, seed=5, num_hidden_layers=2))


@pytest.fixture(scope="module")
def one_process(gloo_world):
    @functools.cache
    def of(kind):
        return gloo_world(1).run(train_steps, STUDENT(), two_of(kind), changes_of({}))[0]

    return of


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *(("dense", name) for name in ("TP2+SP", "PP2", "CP2", "DP2", "TP2xPP2", "CP2xDP2, packed", "packed")),
        *(("mixture", name) for name in ("EP2", "TP2+SPxEP2")),
    ],
)
def test_every_layout_equals_one_process(kind, layout, gloo_world, one_process):
    world_size, changes = (DENSE if kind == "dense" else MOE)[layout]
    found = gloo_world(world_size).run(train_steps, STUDENT(), two_of(kind), changes_of(changes))[0]
    assert_equal_runs(found, one_process(kind))


def test_one_process_equals_transformers(one_process):
    """The loss and the gradient are what each teacher makes of its rows, added up."""
    totals, gradients, tokens = 0.0, {}, 0
    for tag, teacher in zip("ab", two_of("dense").values(), strict=True):
        loss, gradient, count = oracle(STUDENT(), teacher, 0.5, 0.9, 0.3, of=lambda sample, tag=tag: sample.tag == tag)
        totals, tokens = totals + loss * count, tokens + count
        gradients = {name: gradients.get(name, 0) + value * count for name, value in gradient.items()}
    expected = {name: value / tokens for name, value in gradients.items()}
    assert_equals_oracle(one_process("dense")[0], totals / tokens, expected, tokens)


def test_a_teacher_with_a_cache_and_a_model_gives_the_parts_of_both(gloo_world, tmp_path):
    """The cache has some rows of the first teacher, whose model scores the others; the second has no cache."""
    objective = RECIPE["distill"] | OBJECTIVES["top-k, renormalize"]
    models = two_of("dense")
    gloo_world(1).run(write, STUDENT(), teacher_of(), {}, tmp_path, numbers=range(0, 24, 6))
    entries = TWO["teachers"]
    with_cache = TWO | {"teachers": [entries[0] | {"teacher_cache": str(tmp_path)}, entries[1]]}
    expected = gloo_world(1).run(train_steps, STUDENT(), models, {"teacher": TWO, "distill": objective})[0]
    world_size, changes = DENSE["CP2xDP2, packed"]
    changes = changes | {"teacher": with_cache, "distill": objective}
    found = gloo_world(world_size).run(train_steps, STUDENT(), models, changes)[0]
    assert_equal_runs(found, expected)


class Tagged:
    """What is looked at of a dataset."""

    rows = ("a", "b", "a")
    tags = frozenset(rows)

    def first_row_with_tag(self, tag):
        return self.rows.index(tag)


def test_a_row_that_no_teacher_has_a_tag_for_is_an_error():
    require_teachers(Tagged(), ["a", "b", "c"], "subject")
    with pytest.raises(
        UserError, match="row 1 of the dataset: subject = 'b': no teacher has this tag; the teachers' tags are a, c"
    ):
        require_teachers(Tagged(), ["c", "a"], "subject")
