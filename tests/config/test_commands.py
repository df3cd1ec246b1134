"""The options of the commands beside train, and their checks of a recipe."""

import pytest

from megatron_gkd.config import checks, commands, options
from megatron_gkd.config.errors import RecipeError
from megatron_gkd.config.load import load


def test_options_are_taken_from_among_the_overrides():
    arguments = ["--beta", "1", "--from=teacher", "--output", "x.jsonl", "-n", "3", "--packing"]
    found, rest = options.take_options(arguments, commands.GENERATE)
    assert found == {"from": "teacher", "output": "x.jsonl", "n": 3, "chunk_rows": 256}
    assert rest == ["--beta", "1", "--packing"]


@pytest.mark.parametrize(
    ("arguments", "problems"),
    [
        (["--from", "teacher"], ["--output: missing; must be a .jsonl file"]),
        (["--output", "x.jsonl", "--from", "me"], ["--from = me: must be teacher or student"]),
        (["--output", "x.jsonl", "--from", "student", "--n", "0"], ["--n = 0: must be an integer >= 1"]),
        ([], ["--from: missing; must be teacher or student", "--output: missing"]),
    ],
)
def test_wrong_options_are_one_line_each(arguments, problems):
    with pytest.raises(RecipeError) as error:
        options.take_options(arguments, commands.GENERATE)
    found = error.value.problems
    assert len(found) == len(problems)
    assert all(line.startswith(start) for line, start in zip(found, problems, strict=True))


NO_MODEL = ["--teacher_model", "null", "--offload_teacher_model", "false"]
UNNAMED = "teacher.teacher_kind = null: must be local, server, self, cache or none, or follow from teacher_model, "
BEHIND_A_SERVER = [*NO_MODEL, "--teacher_model_server", "http://host:8000"]


@pytest.mark.parametrize(
    ("command", "arguments", "problems"),
    [
        ("SCORES", ["--gkd_logits_topk", "8"], []),
        ("SCORES", ["--gkd_logits_topk", "8", "--teacher_cache", "not/yet"], []),
        ("SCORES", [], ["distill.gkd_logits_topk = null: must be set to score: how many tokens of each"]),
        (
            "SCORES",
            ["--gkd_logits_topk", "8", *NO_MODEL, "--teacher_cache", "not/yet"],
            ["teacher.teacher_kind = cache: must be a teacher whose weights do not change"],
        ),
        ("SCORES", ["--gkd_logits_topk", "8", *NO_MODEL], [UNNAMED]),
        ("TEACHER_GENERATES", NO_MODEL, [UNNAMED]),
        ("STUDENT_GENERATES", NO_MODEL, []),
        ("PLANS", NO_MODEL, []),
        ("TRAIN", NO_MODEL, []),
        ("TRAIN", ["--teacher_model", "null"], [UNNAMED]),
        ("TEACHER_GENERATES", ["--teacher_cache", "not/yet"], []),
        (
            "TEACHER_GENERATES",
            ["--teacher_kind", "none", *NO_MODEL],
            ["teacher.teacher_kind = none: must be local or server to generate"],
        ),
        ("STUDENT_GENERATES", ["--teacher_kind", "none", *NO_MODEL], []),
        (
            "STUDENT_GENERATES",
            ["--truncation_strategy", "split"],
            ["data.truncation_strategy = split: must be delete, left or right to generate"],
        ),
        ("TEACHER_GENERATES", BEHIND_A_SERVER, []),
        ("STUDENT_GENERATES", BEHIND_A_SERVER, []),
        ("TRAIN", BEHIND_A_SERVER, ["distill.gkd_logits_topk = null: must be set with teacher.teacher_model_server"]),
    ],
)
def test_the_checks_of_a_command(workspace, command, arguments, problems):
    found, command_checks = [], getattr(checks if command == "TRAIN" else commands, command)
    try:
        load(workspace.recipe, arguments, world_size=2, command=command_checks)
    except RecipeError as error:
        found = error.problems
    assert len(found) == len(problems), found
    assert all(line.startswith(start) for line, start in zip(found, problems, strict=True))
