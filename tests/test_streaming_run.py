"""Runs that read their rows while they train."""

from __future__ import annotations

import json

import pytest
from command_line import train

OPTIONS = ("--tensor_model_parallel_size", "1", "--sequence_parallel", "false", "--dtype", "fp32", "--val_dataset",
           "[]", "--lr_decay_style", "constant", "--save_interval", "1", "--export_interval", "null")  # fmt: skip
ON_POLICY = ("--lmbda", "0.5", "--lmbda_granularity", "row", "--max_completion_length", "8")
STREAM = (*OPTIONS, "--streaming", "true")


def losses(folder, *options, processes=1):
    """The loss of each step; the run's files are in `folder`/runs/x."""
    finished = train(folder, *options, processes=processes)
    assert finished.returncode == 0, finished.stderr
    return read_losses(folder), finished.stdout


def read_losses(folder):
    records = [json.loads(line) for line in (folder / "runs/x/metrics.jsonl").read_text().splitlines()]
    return {record["step"]: (record["loss"], record["grad_norm"]) for record in records if "loss" in record}


@pytest.fixture
def weights(workspace):
    return lambda: (workspace / "runs/x/hf/model.safetensors").read_bytes()


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(workspace, weights):
    buffer = ("--shuffle_buffer_size", "12")
    whole, shown = losses(workspace, *STREAM, *buffer, "--train_iters", "6")
    assert "training: streamed from 1 source, each drawn from 12, and tokenized while training" in shown
    assert "6, starting at step 1" in shown
    assert "streamed rows of this run: 48 of 48 rows used" in shown
    trained = weights()
    again = (*STREAM, *buffer, "--output_dir", "runs/x", "--resume")
    losses(workspace, *again, "never", "--train_iters", "3", "--dataloader_num_workers", "2")
    resumed, shown = losses(workspace, *again, "auto", "--train_iters", "6")
    assert "streamed rows of this run: 24 of 24 rows used" in shown
    assert resumed == whole and weights() == trained

    (workspace / "train.jsonl").write_text((workspace / "train.jsonl").read_text() + "\n")
    finished = train(workspace, *again, "auto", "--train_iters", "7", processes=1)
    assert finished.returncode == 2
    assert "data.dataset (content and weight of each source) = [[" in finished.stderr


def test_a_bad_row_ends_the_run_at_its_step_with_what_was_learned(workspace):
    """Also on-policy, and on two data-parallel ranks: all other losses are those of tokenized rows on one."""
    in_order = ("--shuffle", "false", "--train_iters", "4", *ON_POLICY)
    tokenized, _ = losses(workspace, *OPTIONS, *in_order)
    lines = (workspace / "train.jsonl").read_text().splitlines()
    lines[17] = "{"  # of the third step
    (workspace / "train.jsonl").write_text("\n".join(lines) + "\n")
    streamed = (*STREAM, *in_order, "--resume", "never", "--dataloader_num_workers", "1")
    finished = train(workspace, *streamed, processes=2)
    assert finished.returncode == 2 and "Traceback" not in finished.stderr
    problem = "stopped after step 2 of 4: train.jsonl, line 18: not JSON: "
    assert finished.stderr.count(problem) == 1
    assert "The student of step 2 is in " in finished.stderr
    assert "continues the run from its checkpoint" in finished.stderr
    found = read_losses(workspace)
    assert sorted(found) == [1, 2]
    for step, values in found.items():
        assert values == pytest.approx(tokenized[step], rel=1e-5)
