"""Runs that are continued by the same command, with other settings, or in another folder."""

from __future__ import annotations

import json

from command_line import train

OPTIONS = ("--tensor_model_parallel_size", "1", "--save_interval", "1", "--export_interval", "null")
CONSTANT = (*OPTIONS, "--lr_decay_style", "constant")


def succeed(folder, *options):
    finished = train(folder, *options, processes=1)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def steps(run, file="metrics.jsonl"):
    records = [json.loads(line) for line in (run / file).read_text().splitlines()]
    return [record["step"] for record in records if "split" not in record]


def test_another_recipe_is_refused_by_key(workspace):
    options = (*OPTIONS, "--train_iters", "2")
    succeed(workspace, *options)
    finished = train(workspace, *options, "--lr", "2e-3", processes=1)
    assert finished.returncode != 0
    message = "train.lr = 0.002: the checkpoint runs/x/checkpoints/step-000002 was trained with 0.001"
    assert finished.stderr.count(message) == 1 and "train.resume = never" in finished.stderr
    assert "training/run.py" not in finished.stderr, "a traceback of ours"


def test_a_finished_run_is_exported_in_its_place_again_and_may_get_more_steps(workspace):
    run = workspace / "runs/x"
    succeed(workspace, *CONSTANT, "--train_iters", "2")
    there, weights = names(run), (run / "hf/model.safetensors").read_bytes()
    assert "all of them done, resumed from" in succeed(workspace, *CONSTANT, "--train_iters", "2")
    assert names(run) == there and (run / "hf/model.safetensors").read_bytes() == weights

    finished = train(workspace, *CONSTANT, "--train_iters", "1", processes=1)
    assert finished.returncode != 0
    message = "train.train_iters = 1: must be at least 2, the step of runs/x/checkpoints/step-000002"
    assert finished.stderr.count(message) == 1 and "training/run.py" not in finished.stderr
    assert names(run) == there

    succeed(workspace, *CONSTANT, "--train_iters", "3")
    assert names(run) == there and steps(run) == [1, 2, 3]
    assert (run / "hf/model.safetensors").read_bytes() != weights


def test_a_run_goes_on_in_the_folder_of_another_one_whose_files_are_kept(workspace):
    first, other = workspace / "runs/x", workspace / "runs/other"
    elsewhere = ("--output_dir", "runs/other")
    succeed(workspace, *CONSTANT, "--train_iters", "2")
    succeed(workspace, *CONSTANT, *elsewhere, "--train_iters", "3", "--lr", "3e-3")
    kept = {name: names(other / name) for name in ("hf", "checkpoints")}
    weights = (other / "hf/model.safetensors").read_bytes()

    path = ("--resume", "runs/x/checkpoints/step-000001")
    shown = succeed(workspace, *CONSTANT, *elsewhere, *path, "--train_iters", "2")
    assert "starting at step 2, resumed from runs/x/checkpoints/step-000001" in shown
    assert steps(other) == [2] and steps(other, "metrics.jsonl.1") == [1, 2, 3]
    assert {name: names(other / f"{name}.1") for name in kept} == kept
    assert (other / "hf.1/model.safetensors").read_bytes() == weights
    assert (other / "hf/model.safetensors").read_bytes() == (first / "hf/model.safetensors").read_bytes()

    # The same command, as of a job that is started again: it does not go back to the path.
    shown = succeed(workspace, *CONSTANT, *elsewhere, *path, "--train_iters", "3")
    assert "starting at step 3, resumed from runs/other/checkpoints/step-000002" in shown
    assert steps(other) == [2, 3] and "metrics.jsonl.2" not in names(other)
