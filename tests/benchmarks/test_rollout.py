"""The benchmark of rollouts: engines get the same request, and its results become tables."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch
from benchmarks.environment import describe
from benchmarks.rollouts import ahead, measure, report
from benchmarks.rollouts.cases import Case, default_cases, save_models
from benchmarks.rollouts.engines import OURS
from benchmarks.timing import Plan

CASE = Case("tiny, mixed lengths", 96, (3, 9), (2, 12), 5)


def measure_engines(rank, world_size, folder):
    """The record of the engines that are in this environment, over a tiny model."""
    from benchmarks.rollouts import cases

    cases.LAYERS, cases.SIZES = 2, dict(hidden_size=32, intermediate_size=48, num_attention_heads=2, head_dim=16)
    engines = measure.Engines([OURS, "transformers"], save_models([CASE], folder)[CASE.vocab_size])
    record = engines.measure(CASE, Plan(1, 1, 0.0))
    engines.close()
    return record


def test_engines_generate_the_same(gloo_world, tmp_path):
    (record,) = gloo_world(1).run(measure_engines, tmp_path)
    ours, theirs = (record["contestants"][name] for name in (OURS, "transformers"))
    assert theirs["equal_completions"] == ours["equal_completions"] == CASE.num_prompts
    assert ours["tokens"] == theirs["tokens"] < CASE.num_prompts * CASE.completion_lengths[1]
    assert record["longest_completion"] == CASE.completion_lengths[1]
    assert all(len(one["total_s"]) == 1 for one in (ours, theirs))


def measure_ahead(rank, world_size):
    """The record of one share; and the order in which samples are requested and received, and gradients computed."""
    from megatron_gkd.training.on_policy import Rollouts
    from megatron_gkd.training.student import Student

    ahead.LAYERS, ahead.SIZES, ahead.SHARES = 1, dict(hidden_size=32, head_dim=16, vocab_size=64), (1.0,)
    events = []

    def noted(name, method):
        return lambda *arguments, **options: events.append(name) or method(*arguments, **options)

    with (
        mock.patch.object(Rollouts, "begin", noted("begin", Rollouts.begin)),
        mock.patch.object(Rollouts, "_receive", noted("receive", Rollouts._receive)),
        mock.patch.object(Student, "compute_gradients", noted("gradient", Student.compute_gradients)),
    ):
        return ahead.measure(3), events


def test_steps_ahead_are_sampled_while_gradients_are_computed(gloo_world):
    records, events = gloo_world(1).run(measure_ahead)[0]
    before_gradients = [events[place - 1] for place, event in enumerate(events) if event == "gradient"]
    assert before_gradients[:5] == 5 * ["receive"], "steps that are sampled in turn"
    assert before_gradients[5:] == ["begin", *3 * ["receive", "begin", "begin"]]
    (record,) = records
    assert len(record["step_s"]) == len(record["rollout_half_s"]) == 3 and record["ratio"] > 0


def test_the_tables(tmp_path):
    ok = {"status": "ok", "install": "", "tokens": 100, "equal_completions": 5}
    absent = {"status": "not installed", "install": "bash scripts/setup_vllm.sh", "total_s": []}
    contestants = {OURS: ok | {"total_s": [2.0]}, "transformers": ok | {"total_s": [4.0, 5.0, 6.0]}, "vLLM": absent}
    case = {"case": "a case", "prompts": 5, "is_greedy": True, "contestants": contestants}
    step = {"case": "a step", "rollout_half_s": [1.0], "training_half_s": [2.0], "step_s": [2.2], "ratio": 1.1}
    run = {"environment": describe(torch.device("cpu")), "rollouts": [case], "ahead": [step | {"ratio_in_turn": 0.73}]}
    report.write(run, tmp_path)
    written = {path.suffix: path.read_text() for path in tmp_path.iterdir()}
    assert json.loads(written[".json"]) == run
    assert "| a case | 100 | 50 | 20 |  | 2.50 |  | 5 of 5 |  |" in written[".md"]
    assert "| a step | 2000 | 2200 | 1.10 (≤ 1.15: reached) | 0.73 |" in written[".md"]
    assert "- vLLM: not installed: bash scripts/setup_vllm.sh" in written[".md"]


@pytest.mark.parametrize("case", default_cases(), ids=lambda case: case.name)
def test_cases_have_prompts_of_their_lengths(case):
    lengths = [len(prompt) for prompt in case.prompts()]
    assert case.prompt_lengths[0] <= min(lengths) <= max(lengths) <= case.prompt_lengths[1]
    completions = [
        [1000 * index + place for place in range(case.completion_lengths[1])] for index in range(len(lengths))
    ]
    stops = case.stop_tokens(completions)
    assert (len(stops) == 0) == (not case.is_greedy or case.completion_lengths[0] == case.completion_lengths[1])
