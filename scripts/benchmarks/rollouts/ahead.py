"""Whole steps of `train_step` that are sampled by a server one step ahead, beside their two halves.

The server sleeps as long as training takes, half, or twice as long: what overlaps is then the longer of the two. The
halves are those of steps that are not sampled ahead, in the same process: the rollout with the weights' way to the
server, and the rest of the step.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

import httpx
import numpy as np
import torch.distributed as dist

from benchmarks.random_runs import RandomRun, recipe_of, save_model
from benchmarks.rollouts.sleeping_server import SleepingServer
from megatron_gkd.data.batch_config import BatchConfig
from megatron_gkd.data.lambda_schedule import LambdaSchedule
from megatron_gkd.data.order import SampleOrder
from megatron_gkd.data.sample import Sample
from megatron_gkd.rollout.base import Sampling
from megatron_gkd.rollout.vllm.server import VllmServerEngine
from megatron_gkd.rollout.vllm.server_options import RolloutServerOptions
from megatron_gkd.runtime.mesh import destroy_mesh
from megatron_gkd.training.batches import TrainingData
from megatron_gkd.training.exports import Exports
from megatron_gkd.training.on_policy import RolloutOptions, Rollouts
from megatron_gkd.training.step_prompts import StepPrompts
from megatron_gkd.training.trainer import RunOutput, Trainer, TrainerConfig

ROWS, PROMPT, COMPLETION = 8, 32, 32
SIZES = dict(hidden_size=128, intermediate_size=384, num_attention_heads=4, head_dim=32, vocab_size=8192)
LAYERS = 4
SHARES = (0.5, 1.0, 2.0)
"""Seconds of a rollout over those of the rest of the step."""
_CHANGES = {"train": {"global_batch_size": ROWS}, "data": {"max_length": 256}}


class _Prompts:
    """Rows of random tokens: a prompt, and a response that the student's replaces."""

    def __init__(self, count: int, vocab_size: int) -> None:
        generator = np.random.default_rng(5)
        self._rows = generator.integers(4, vocab_size, (count, PROMPT + COMPLETION))
        self.lengths = np.full(count, PROMPT + COMPLETION)
        self.num_labels = np.full(count, COMPLETION)
        self.sizes = [count]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        tokens = self._rows[index]
        labels = np.append(tokens[1:], -100)
        labels[: PROMPT - 1] = -100
        return Sample(input_ids=tokens, labels=labels, source="dataset", row_id=index)


@dataclass
class _Steps:
    """Steps of one run over a server.

    Attributes:
        trainer: of the run.
        server: that samples.
        rollouts: of the trainer.
        records: of each step.
        step: number of the last one.
    """

    trainer: Trainer
    server: SleepingServer
    rollouts: Rollouts
    records: list[dict[str, Any]]
    step: int = 0

    def run(self, count: int) -> list[dict[str, Any]]:
        """Do so many steps, and return their records."""
        for _ in range(count):
            self.step += 1
            self.trainer.train_step(self.step, None)
        return self.records[-count:]


def _steps(run: RandomRun, folder: Path, steps_ahead: int) -> _Steps:
    server, records = SleepingServer(run.vocab_size, COMPLETION), []
    with mock.patch.object(httpx, "Client", return_value=httpx.Client(transport=server.transport())):
        options = RolloutServerOptions(("http://sleeping:1",), folder / f"weights{steps_ahead}", max_length=256)
        engine = VllmServerEngine(run.mesh, run.student.model.checkpoint, options)
    rows = _Prompts(ROWS * 4, run.vocab_size)
    prompts = StepPrompts(
        rows,
        SampleOrder(rows.sizes, [1.0], seed=1, shuffle=True),
        LambdaSchedule(1.0, "step", 1),
        BatchConfig.from_recipe(recipe_of(_CHANGES), run.mesh, pad_token_id=0),
    )
    rollouts = Rollouts(engine, prompts, RolloutOptions(Sampling(COMPLETION), steps_ahead=steps_ahead), run.mesh.dp)
    reporter: Any = SimpleNamespace(step=records.append, plot=lambda: None)
    data = TrainingData((), rollouts=rollouts)
    output = RunOutput(reporter, Exports(folder))
    trainer = Trainer(TrainerConfig(train_iters=10**6), run.student, run.teacher, data, output)
    return _Steps(trainer, server, rollouts, records)


def measure(repeats: int) -> list[dict[str, Any]]:
    """Return a record for each share of the rollout."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory(prefix="rollout_ahead_") as name:
        folder = Path(name)
        models = (save_model(folder / which, LAYERS, **SIZES) for which in ("student", "teacher"))
        run = RandomRun.build(_CHANGES, *models)
        plain, ahead = _steps(run, folder, 0), _steps(run, folder, 1)
        plain.run(2)  # warm-up
        training = median(map(_training_seconds, plain.run(3)))
        records = [_measure_share(share, training, plain, ahead, repeats) for share in SHARES]
        for steps in (plain, ahead):
            steps.rollouts.close()
        destroy_mesh()
    return records


def _measure_share(share: float, training: float, plain: _Steps, ahead: _Steps, repeats: int) -> dict[str, Any]:
    plain.server.seconds = ahead.server.seconds = share * training
    ahead.run(1)  # its samples were made with another time
    steps, halves = [], []
    for _ in range(repeats):
        (one,) = plain.run(1)
        halves.append((one["rollout_time_s"] + one["sync_time_s"], _training_seconds(one)))
        steps.append(ahead.run(2)[-1]["step_time_s"])
    rollout, rest = (median(values) for values in zip(*halves, strict=True))
    return {
        "case": f"rollout {share:g} x training",
        "step_s": steps,
        "rollout_half_s": [half[0] for half in halves],
        "training_half_s": [half[1] for half in halves],
        "ratio": median(steps) / max(rollout, rest),
        "ratio_in_turn": median(steps) / (rollout + rest),
    }


def _training_seconds(record: dict[str, Any]) -> float:
    return record["step_time_s"] - record["rollout_time_s"] - record["sync_time_s"]
