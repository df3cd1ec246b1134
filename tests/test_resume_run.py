"""A run that is continued with other settings than it was begun with."""

from __future__ import annotations

from command_line import train


def test_another_recipe_is_refused_by_key(workspace):
    options = ("--tensor_model_parallel_size", "1", "--train_iters", "2", "--save_interval", "1")
    assert train(workspace, *options, processes=1).returncode == 0
    finished = train(workspace, *options, "--lr", "2e-3", processes=1)
    assert finished.returncode != 0
    message = "train.lr = 0.002: the checkpoint runs/x/checkpoints/step-000002 was trained with 0.001"
    assert finished.stderr.count(message) == 1 and "train.resume = never" in finished.stderr
    assert "training/run.py" not in finished.stderr, "a traceback of ours"
