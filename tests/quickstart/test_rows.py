"""The rows of the experiment's table, and their recipes."""

import pytest
from quickstart.rows import (
    EXPERIMENT_TEACHER,
    FROM_SCRATCH,
    IMAGES,
    IMAGES_TEACHER,
    LORA,
    ON_POLICY,
    QUICK,
    QUICK_TEACHER,
    SELF,
    result_names,
    select_rows,
)
from world import REPOSITORY

from megatron_gkd.config.load import load

ROWS = select_rows(on_policy=True, is_own_teacher=True, lora=True)
TEACHERS = {
    **dict.fromkeys(ROWS, EXPERIMENT_TEACHER),
    **dict.fromkeys(QUICK, QUICK_TEACHER),
    **dict.fromkeys(IMAGES, IMAGES_TEACHER),
}


def recipe_of(row):
    return load(REPOSITORY / f"scripts/quickstart/recipes/{row.recipe}.yaml", world_size=2, require_paths=False)


@pytest.mark.parametrize("row", TEACHERS, ids=lambda row: row.recipe)
def test_recipe_and_row_agree(row):
    recipe = recipe_of(row)
    folder = "runs/quickstart/images" if row in IMAGES else "runs/quickstart"
    untrained = f"{folder}/untrained/student_seed1"
    start = {other.name: f"runs/quickstart/{other.recipe}_seed1/hf" for other in ROWS}.get(row.start, untrained)
    assert recipe.student.model == start
    assert recipe.output.output_dir == f"runs/quickstart/{row.recipe}_seed1"
    assert (recipe.teacher.source == "local") == row.has_teacher
    if row.has_teacher:
        assert recipe.teacher.teacher_model == f"runs/quickstart/{TEACHERS[row]}/hf"
    assert (recipe.teacher.teacher_model == recipe.student.model) == row.is_own_teacher
    assert (recipe.lora is not None and recipe.lora.merge_lora) == row.has_adapters
    assert [entry.path for entry in recipe.data.dataset] == [f"{folder}/data/{row.data}.jsonl"]


@pytest.mark.parametrize(
    "rows", [QUICK, FROM_SCRATCH, ON_POLICY, IMAGES], ids=["quick", "from scratch", "on-policy", "images"]
)
def test_rows_that_are_compared_have_the_same_steps(rows):
    recipes = [recipe_of(row) for row in rows]
    for section in ("parallel", "data", "train", "student"):
        assert len({repr(getattr(recipe, section)) for recipe in recipes}) == 1, section


def test_a_row_continues_an_earlier_one():
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert all(row.start is None or row.start in names[: names.index(row.name)] for row in ROWS)


def test_self_distillation_has_the_steps_of_the_student_that_continues_without_it():
    train = [repr(recipe_of(row).train) for row in SELF[1:]]
    assert train[0].replace("eval_interval=50", "eval_interval=None") == train[1]


def test_adapters_differ_from_all_parameters_in_the_learning_rate_alone():
    full, lora = (recipe_of(row) for row in LORA[1:])
    rest = {"lora": None, "output": lora.output}
    assert lora.train.lr > full.train.lr
    assert lora.model_copy(update=rest | {"train": full.train}) == full.model_copy(update=rest)
    assert lora.train.model_copy(update={"lr": full.train.lr}) == full.train


@pytest.mark.parametrize(
    ("chosen", "rows", "names"),
    [
        ((), FROM_SCRATCH, ["results"]),
        (("on_policy",), FROM_SCRATCH + ON_POLICY, ["on_policy"]),
        (("is_own_teacher",), SELF, ["self"]),
        (("lora",), LORA, ["lora"]),
        (("on_policy", "lora"), (*FROM_SCRATCH, *ON_POLICY, LORA[-1]), ["on_policy", "lora"]),
    ],
)
def test_each_row_is_selected_once_and_results_have_a_name(chosen, rows, names):
    found = select_rows(**{name: name in chosen for name in ("on_policy", "is_own_teacher", "lora")})
    assert found == rows and result_names(found) == names


def test_results_with_images_have_a_name():
    assert result_names(IMAGES) == ["images"]
