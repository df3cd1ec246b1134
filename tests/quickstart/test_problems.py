"""The generated problems: reproducible, disjoint, and right, by a reading of the story that is not the generator's."""

import json
import re
from itertools import islice, pairwise

import pytest
from quickstart.prepare import (
    SLIPS,
    STUDENT,
    TEACHER,
    make_splits,
    read_problems,
    write_for_self,
    write_problems,
    write_with_hints,
)
from quickstart.problems import extract_answer, make_problems

GAINS, LOSSES = r"gives \w+ (\d+) more|buys (\d+) more|finds another (\d+)", r"gives (\d+) of|loses (\d+)|sells (\d+)"


@pytest.fixture(scope="module")
def splits():
    return make_splits()


def quantity_in_the_end(question: str) -> int:
    start, *changes = question.split(". ")
    numbers = [int(number) for number in re.findall(r"\d+", start)]
    quantity = numbers[0] * numbers[1] if len(numbers) == 2 else numbers[0]
    for change in changes:
        for pattern, sign in ((GAINS, 1), (LOSSES, -1)):
            for groups in re.findall(pattern, change):
                quantity += sign * int("".join(groups))
    return quantity


def calculations(solution: str) -> list[tuple[str, int]]:
    return [(left, int(right)) for left, right in re.findall(r"(\d+[-+*]\d+)=(\d+)", solution)]


def value(expression: str) -> int:
    left, operator, right = re.fullmatch(r"(\d+)([-+*])(\d+)", expression).groups()
    return {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[operator](int(left), int(right))


def test_the_same_seed_gives_the_same_problems_and_another_seed_others():
    first, again, other = (list(islice(make_problems(seed), 50)) for seed in (3, 3, 4))
    assert first == again
    assert not {p.question for p in first} & {p.question for p in other}


def test_no_question_is_in_two_splits(splits):
    questions = [problem.question for problems in splits.values() for problem in problems]
    assert len(questions) == len(set(questions))


@pytest.mark.parametrize("split", ["test", "validation", "teacher_train", "self_train"])
def test_answers_and_every_calculation_are_right(splits, split):
    for problem in splits[split]:
        assert problem.answer == quantity_in_the_end(problem.question), problem
        assert all(value(left) == right for left, right in calculations(problem.solution)), problem
        assert extract_answer(problem.solution) == problem.answer
        assert 2 <= len(calculations(problem.solution)) <= 3


def test_slips_are_as_frequent_as_asked_and_carried_on(splits):
    steps = [calculations(problem.solution) for problem in splits["student_train"]]
    wrong = [value(left) != right for solution in steps for left, right in solution]
    assert abs(sum(wrong) / len(wrong) - SLIPS) < 0.03
    for solution in steps:
        for (_, result), (following, _) in pairwise(solution):
            assert int(re.match(r"\d+", following).group()) == result
    for problem, solution in zip(splits["student_train"], steps, strict=True):
        assert extract_answer(problem.solution) == problem.answer == solution[-1][1]


def test_quantities_are_positive_numbers_of_two_digits(splits):
    numbers = [int(n) for problems in splits.values() for p in problems for n in re.findall(r"\d+", p.solution)]
    assert min(numbers) > 0 and max(numbers) < 100


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("10-3=7. The answer is 7.", 7),
        ("The answer is 7. The answer is 12.", 12),
        ("The answer is -4.", -4),
        ("The answer is 7", None),
        ("10-3=7.", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_problems_survive_their_file(tmp_path, splits):
    write_problems(tmp_path / "rows.jsonl", splits["validation"])
    assert list(read_problems(tmp_path / "rows.jsonl")) == splits["validation"]


def test_a_hint_has_the_calculations_and_none_of_the_words(tmp_path, splits):
    problems = splits["student_train"][:20]
    write_with_hints(tmp_path / "hints.jsonl", problems)
    write_for_self(tmp_path / "self.jsonl", problems)
    rows = [json.loads(line) for line in (tmp_path / "hints.jsonl").read_text().splitlines()]
    for_self = [json.loads(line) for line in (tmp_path / "self.jsonl").read_text().splitlines()]
    for problem, plain, hinted, alone in zip(problems, rows[::2], rows[1::2], for_self, strict=True):
        assert plain["messages"] == problem.messages() and alone["messages"] == problem.messages()[:1]
        question, solution = hinted["messages"]
        assert question["content"] == alone["teacher_prompt"] and solution == plain["messages"][1]
        hint = question["content"].removeprefix(problem.question)
        assert calculations(hint) == calculations(problem.solution) != []
        assert re.findall("[A-Za-z]+", hint) == ["Hint"]


@pytest.mark.parametrize("shape", [TEACHER, STUDENT], ids=["teacher", "student"])
def test_vllm_can_serve_the_models_on_cpus(shape):
    """Its kernels there have heads of these sizes (vLLM 0.32)."""
    assert shape["head_dim"] in (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
