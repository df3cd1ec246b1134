"""A run that is killed goes on by the same command, bit by bit, as if nothing had happened.

`scripts/fault_test.py` does the same with more steps and more kills.
"""

from __future__ import annotations

import json
import random
import re
import shutil

import pytest
import torch
from faults.configurations import CONFIGURATIONS
from faults.injection import function_at
from faults.outcome import differences
from faults.points import POINTS, WEIGHTS, Kill, draw, find
from faults.runs import FaultRuns
from safetensors.torch import load_file, save_file

STEPS, KILLS = 12, 3
SEEDS = {
    "offline TP2": 20,
    "PP2xVPP2 tied": 10,
    "MoE EP2": 9,
    "on-policy megatron": 210,
    "steps_ahead 1": 55,
    "EMA self-teacher": 242,
    "cached teacher": 49,
    "LoRA TP2": 2439,
}
"""They draw, over all configurations, 23 points of eight kinds, which runs of 12 steps come to."""


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_run_that_is_killed_three_times_is_the_run_that_was_never_killed(name, tmp_path):
    runs, made = FaultRuns(name, tmp_path, steps=STEPS), 0
    for number in range(1, 4):  # one is enough, unless a save is not published in time for the point that was drawn
        result = runs.draw_and_run(number, KILLS - made, SEEDS[name])
        assert not result.problems, "\n".join(result.problems)
        made += result.num_kills
        if made == KILLS:
            return
    raise AssertionError(f"{made} of {KILLS} points were reached; other SEEDS draw other ones")


@pytest.fixture(scope="module")
def short_runs(tmp_path_factory):
    return FaultRuns("offline TP2", tmp_path_factory.mktemp("short"), steps=4)


def test_a_point_that_is_never_reached_is_no_kill(short_runs):
    kill = Kill(find("in a forward pass"), rank=0, is_everyone=True, target=1, call=1, share=0.5)
    result = short_runs.run(1, [kill])
    assert result.num_kills == 0 and not result.kills[0].happened
    assert not result.problems


def test_what_differs_is_reported(short_runs, tmp_path):
    expected = short_runs.folder / "whole"

    def problems(damage) -> str:
        found = tmp_path / damage.__name__
        shutil.copytree(expected, found)
        damage(found)
        return "\n".join(differences(found, expected))

    def nothing(folder):
        pass

    def a_bit_of_a_weight(folder):
        weights = load_file(folder / "hf/model.safetensors")
        weights["model.norm.weight"].view(torch.uint8)[0] ^= 1
        save_file(weights, folder / "hf/model.safetensors")

    def a_record_twice(folder):
        with open(folder / "metrics.jsonl", "a") as file:
            file.write((folder / "metrics.jsonl").read_text().splitlines(keepends=True)[0])

    def another_number(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        lines[2]["grad_norm"] = 1.0
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def another_step_in_tensorboard(folder):
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(folder / "tensorboard") as writer:
            writer.add_scalar("train/loss", 1.0, 3)

    def another_checkpoint(folder):
        checkpoint = folder / "checkpoints/step-000004"
        shutil.rmtree(checkpoint)
        shutil.copytree(folder / "checkpoints/step-000003", checkpoint)

    def a_leftover(folder):
        (folder / "checkpoints/step-000004.1.unfinished").mkdir()

    def bad_steps_forgotten(folder):
        shutil.rmtree(folder / "bad_steps")

    assert problems(nothing) == ""
    assert "hf/model.safetensors: 1 of" in problems(a_bit_of_a_weight)
    assert "metrics.jsonl:" in problems(a_record_twice)
    assert "metrics.jsonl, entry 3: {'grad_norm': 1.0} instead of" in problems(another_number)
    assert "tensorboard" in problems(another_step_in_tensorboard)
    reported = problems(another_checkpoint)
    assert int(re.search(r"checkpoints/step-000004: (\d+) of", reported)[1]) > 20, "weights, masters and both moments"
    assert "checkpoints/step-000004/run.json" in reported
    assert "left behind" in problems(a_leftover)
    assert "bad_steps" in problems(bad_steps_forgotten)


def functions_of_points(rank, world_size):
    return [callable(function_at(point.target)[2]) for point in POINTS if point.moment != "time"]


def test_every_point_is_of_a_function_that_there_is(gloo_world):
    assert all(gloo_world(1).run(functions_of_points)[0])


def test_a_seed_draws_the_same_points_of_all_kinds():
    sizes = dict(steps=40, processes=2, has={"rollouts", "validation"})
    kills = draw(random.Random("seed"), 500, **sizes)
    assert kills == draw(random.Random("seed"), 500, **sizes)
    assert [kill.target for kill in kills] == sorted(kill.target for kill in kills)
    assert {kill.point.kind for kill in kills} == WEIGHTS.keys()
    assert all(kill.point.needs in ("", *sizes["has"]) for kill in kills)
    assert all(kill.rank == 0 for kill in kills if kill.point.in_main)
    assert {kill.rank for kill in kills} == {0, 1} and {kill.is_everyone for kill in kills} == {True, False}
