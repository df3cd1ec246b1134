import json
import math

import numpy as np
import pytest
import torch
from faults.outcome import events_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_gkd.reporting import MetricsLog


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_object_a_line_and_on_disk_at_once(tmp_path):
    log = MetricsLog(tmp_path / "runs" / "x", tensorboard=False)
    log.write({"step": 1, "loss": 2.5, "source": "dataset", "teacher_entropy": None})
    assert lines(log.path) == [{"step": 1, "loss": 2.5, "source": "dataset", "teacher_entropy": None}]
    log.write({"step": 2, "split": "validation", "loss": 2.0})
    assert lines(log.path)[1] == {"step": 2, "split": "validation", "loss": 2.0}
    log.close()
    assert not (tmp_path / "runs" / "x" / "tensorboard").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, torch.tensor(math.nan), np.float32("inf")])
def test_what_is_not_finite_becomes_null(tmp_path, value):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write({"step": 1, "loss": value})
        assert lines(log.path) == [{"step": 1, "loss": None}]


def test_tensors_and_numpy_scalars_give_their_number(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write({"step": np.int64(3), "loss": torch.tensor([0.5]), "num_tokens": torch.tensor(7)})
        assert lines(log.path) == [{"step": 3, "loss": 0.5, "num_tokens": 7}]


def test_tensorboard_has_the_same_numbers(tmp_path):
    with MetricsLog(tmp_path, tensorboard=True) as log:
        for step in (1, 2):
            log.write({"step": step, "loss": 1.0 / step, "source": "dataset", "grad_norm": math.nan})
        log.write({"step": 2, "split": "validation", "loss": 0.25})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["train/loss", "validation/loss"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]
    assert [(event.step, event.value) for event in events.Scalars("validation/loss")] == [(2, 0.25)]


def test_earlier_runs_are_kept(tmp_path):
    for run in range(3):
        with MetricsLog(tmp_path, tensorboard=True) as log:
            log.write({"step": 1, "loss": float(run)})
    losses = {path.name: lines(path)[0]["loss"] for path in tmp_path.glob("metrics.jsonl*")}
    assert losses == {"metrics.jsonl.1": 0.0, "metrics.jsonl.2": 1.0, "metrics.jsonl": 2.0}
    for name, loss in (("tensorboard.1", 0.0), ("tensorboard.2", 1.0), ("tensorboard", 2.0)):
        (event,) = EventAccumulator(str(tmp_path / name)).Reload().Scalars("train/loss")
        assert event.value == loss


def test_a_resumed_run_shows_each_step_once(tmp_path):
    for last_step in (None, 2, 3):
        with MetricsLog(tmp_path, last_step=last_step) as log:
            for step in range((last_step or 0) + 1, 5):
                log.write({"step": step, "loss": float(step)})
                log.write_text("completions", f"step {step}", step)
    assert [line["step"] for line in lines(log.path)] == [1, 2, 3, 4]
    events = events_of(tmp_path / "tensorboard")
    losses = [(step, float(value)) for tag, step, value in events if tag == "train/loss"]
    assert losses == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert [step for tag, step, _ in events if tag.startswith("completions")] == [1, 2, 3, 4]
