"""Evaluation of a checkpoint, and what is shown of it."""

import json
import random

import pytest
import torch
from quickstart.evaluate import Scores, evaluate
from quickstart.prepare import write_problems, write_tokenizer, write_untrained
from quickstart.problems import Problem, make_problem
from quickstart.report import draw, markdown_table
from quickstart.rows import FROM_SCRATCH, ON_POLICY
from transformers import AutoModelForCausalLM, AutoTokenizer

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two untrained models with one tokenizer, and the problems that this was trained on."""
    directory, rng = tmp_path_factory.mktemp("checkpoints"), random.Random(0)
    problems = [make_problem(rng) for _ in range(30)]
    write_problems(directory / "rows.jsonl", problems)
    write_tokenizer(directory / "tokenizer", directory / "rows.jsonl")
    for seed, name in enumerate(("student", "teacher")):
        write_untrained(directory / name, directory / "tokenizer", SHAPE, seed)
    return directory / "student", directory / "teacher", problems


def test_an_untrained_model_solves_nothing_and_differs_from_another_but_not_from_itself(checkpoints):
    student, teacher, problems = checkpoints
    apart, same = evaluate(student, teacher, problems), evaluate(teacher, teacher, problems)
    assert apart.accuracy == 0
    assert apart.divergence > 1e-3
    assert same.divergence == pytest.approx(0, abs=1e-6)


def test_cross_entropy_is_of_the_solution_and_its_end_of_turn(checkpoints):
    student, teacher, problems = checkpoints
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)
    total, tokens = 0.0, 0
    for problem in problems:
        ids = tokenizer.apply_chat_template(problem.messages(), return_tensors="pt", return_dict=False)
        length = len(tokenizer(problem.solution).input_ids)
        with torch.no_grad():
            log_probabilities = model(ids).logits[0].log_softmax(-1)
        end = ids.shape[1] - 1  # the last token is the line break after the turn
        for position in range(end - length - 1, end):
            total -= log_probabilities[position - 1, ids[0, position]].item()
        tokens += length + 1
    assert evaluate(student, teacher, problems).cross_entropy == pytest.approx(total / tokens, rel=1e-5)


def test_accuracy_counts_the_last_answer_of_each_solution(checkpoints, monkeypatch):
    student, teacher, _ = checkpoints
    problems = [Problem(f"{n}?", f"The answer is {n}.", n) for n in range(4)]
    texts = ["The answer is 0.", "The answer is 1. The answer is 7.", "2", "The answer is 1. The answer is 3."]
    monkeypatch.setattr("quickstart.evaluate.solve", lambda model, tokenizer, problems, batch_size: texts)
    assert evaluate(student, teacher, problems).accuracy == 0.5


def test_the_table_has_mean_and_spread_over_seeds():
    results = {"teacher": [Scores(0.95, 0.0, 0.1)], "GKD": [Scores(0.6, 0.01, 0.2), Scores(0.7, 0.03, 0.2)]}
    assert markdown_table(results).splitlines()[2:] == [
        "| teacher | 95.0 % | 0.0000 |",
        "| GKD | 65.0 ± 7.1 % | 0.0200 ± 0.0141 |",
    ]


def test_the_picture_is_drawn_from_the_runs_metrics(tmp_path):
    """A run that never sees the dataset's responses has no cross-entropy in training."""
    colors = {row.name: row.color for row in FROM_SCRATCH + ON_POLICY}
    runs = {name: tmp_path / name for name in ("teacher", *colors)}
    for name, run in runs.items():
        run.mkdir()
        training = [{"step": step, "sft_loss": None if name == "on-policy" else 1 / step} for step in (1, 2)]
        validation = [{"split": "validation", "step": step, "sft_loss": 1 / step} for step in (1, 2)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in training + validation))
    draw(runs, {name: [Scores(0.5, 0.1, 0.2)] for name in runs}, colors, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
