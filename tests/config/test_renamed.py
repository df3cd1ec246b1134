"""Recipes and command lines may use the former names of keys."""

import warnings

import pytest

from megatron_gkd.config import keys
from megatron_gkd.config.renamed import NEW_NAMES, RENAMED, DeprecatedKey, current_key, current_value


def load(workspace, *overrides):
    """Return the recipe and the deprecation lines."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recipe = workspace.load(*overrides)
    return recipe, [str(one.message) for one in caught if one.category is DeprecatedKey]


def replace(workspace, old, new):
    text = workspace.recipe.read_text()
    assert old in text
    workspace.recipe.write_text(text.replace(old, new))


def test_new_names_are_keys_and_former_names_are_not():
    for section, names in RENAMED.items():
        assert set(names.values()) <= keys.SECTIONS[section].keys()
    assert not NEW_NAMES.keys() & keys.SECTION_OF.keys()
    assert len(NEW_NAMES) == sum(map(len, RENAMED.values()))


def test_a_former_name_in_the_file(workspace):
    replace(workspace, "{teacher_model: teacher, offload_teacher_model: true}", "{kind: none}")
    recipe, lines = load(workspace)
    assert recipe.teacher.teacher_kind == "none"
    assert lines == ["teacher.kind: deprecated; use teacher.teacher_kind"]
    assert "  kind:" not in recipe.to_yaml()


@pytest.mark.parametrize("arguments", [["--attn", "sdpa"], ["--train.attn=sdpa"]])
def test_a_former_name_on_the_command_line(workspace, arguments):
    recipe, lines = load(workspace, *arguments)
    assert recipe.train.attention_backend == "sdpa"
    assert lines == ["train.attn: deprecated; use train.attention_backend"]


def test_former_names_in_a_list_of_teachers(workspace):
    teachers = "[{tags: a, kind: self, ema: 0.5}, {tags: b, teacher_model: teacher}]"
    recipe, lines = load(
        workspace,
        *("--teachers", teachers, "--teacher_tag_key", "tag", "--teacher_model", "null"),
        *("--offload_teacher_model", "false"),
    )
    assert recipe.teacher.teachers[0].teacher_ema == 0.5
    assert lines == [
        "teacher.teachers[0].kind: deprecated; use teacher.teachers[0].teacher_kind",
        "teacher.teachers[0].ema: deprecated; use teacher.teachers[0].teacher_ema",
    ]


@pytest.mark.parametrize(("former", "present"), [("last", "last_round"), ("all", "default")])
def test_former_values_of_a_former_name(workspace, former, present):
    recipe, lines = load(workspace, "--loss_on", former)
    assert recipe.data.loss_scale == present == current_value("data.loss_on", former)
    assert lines == ["data.loss_on: deprecated; use data.loss_scale"]
    assert current_value("data.loss_scale", former) == former


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("last_round_with_ignore_empty_think", "last_round+ignore_empty_think"),
        ("ignore_empty_think", "default+ignore_empty_think"),
        ("all + ignore_empty_think", "all+ignore_empty_think"),
    ],
)
def test_other_spellings_of_a_loss_scale(workspace, written, name):
    recipe, lines = load(workspace, f"--loss_scale={written}")
    assert (recipe.data.loss_scale, lines) == (name, [])


@pytest.mark.filterwarnings("ignore::megatron_gkd.config.renamed.DeprecatedKey")
def test_a_value_is_checked_under_the_new_name(workspace):
    assert workspace.problems("--attn", "unfused") == [
        "train.attention_backend = unfused: must be one of auto, flash, fused, sdpa"
    ]


def test_both_names_are_refused_in_one_line(workspace):
    problem = "train.attn = auto: is the former name of train.attention_backend; remove attn"
    assert workspace.problems("--attn", "auto", "--attention_backend", "flash", "--dtype", "fp32") == [problem]
    replace(workspace, "seed: 1234", "attn: auto, attention_backend: flash, dtype: fp32")
    assert workspace.problems() == [problem]


def test_the_command_line_overrides_the_file_under_either_name(workspace):
    replace(workspace, "seed: 1234", "attn: flash")
    assert load(workspace, "--attention_backend", "sdpa")[0].train.attention_backend == "sdpa"
    assert load(workspace, "--attn", "auto")[0].train.attention_backend == "auto"


@pytest.mark.parametrize(
    ("key", "current"),
    [
        ("train.attn", "train.attention_backend"),
        ("teacher.teachers[0].kind", "teacher.teachers[0].teacher_kind"),
        ("data.kind", "data.kind"),
        ("student.model (its weights)", "student.model (its weights)"),
        ("lora", "lora"),
    ],
)
def test_keys_of_an_older_checkpoint(key, current):
    assert current_key(key) == current
