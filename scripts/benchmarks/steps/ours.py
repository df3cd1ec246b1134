"""This package's own step: `Trainer.train_step` over microbatches that are ready."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from benchmarks.random_runs import RandomRun
from benchmarks.steps.cases import BETA, CLIP_GRAD, LORA, OPTIMIZER, Case, groups, prompt_length
from benchmarks.steps.turns import PhaseClock, Turns
from megatron_gkd.data.microbatch import Microbatch, collate
from megatron_gkd.data.sample import Sample, shift_labels
from megatron_gkd.runtime.mesh import destroy_mesh
from megatron_gkd.training import loss, trainer

TRAIN = {
    "global_batch_size": 1,  # not read: the microbatches are ready
    "train_iters": 100,
    "dtype": "fp32",
    "lr_decay_style": "constant",
    "lr": OPTIMIZER["lr"],
    "adam_beta1": OPTIMIZER["betas"][0],
    "adam_beta2": OPTIMIZER["betas"][1],
    "adam_eps": OPTIMIZER["eps"],
    "weight_decay": OPTIMIZER["weight_decay"],
    "clip_grad": CLIP_GRAD,
    "moe_aux_loss_coeff": 0.0,  # the other contestants have none
}


class Contestant:
    """One process of this package's training.

    Args:
        rank: of the process.
        processes: their number.
        root: where they meet.
        parallel: the recipe's section.
    """

    def __init__(self, rank: int, processes: int, root: Path, parallel: dict[str, Any]) -> None:
        store = dist.FileStore(str(root / "store"), processes)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
        self._parallel = parallel
        self._clock = PhaseClock()
        trainer.in_phase = self._clock.phase
        loss.fused_linear_divergence = self._clock.around("head and loss", loss.fused_linear_divergence)

    def run(self, case: Case, folder: Path, turns: Turns) -> None:
        """Train until the last turn."""
        run = build(case, folder, self._parallel)
        training = run.trainer(folder)
        records: list[dict[str, Any]] = []
        training.reporter.step = records.append
        microbatches = microbatches_of(case, run.mesh.dp.rank(), run.mesh.dp.size())
        step, self._clock.now = 0, turns.clock.now
        while turns.begin():
            step += 1
            self._clock.take()
            training.train_step(step, microbatches)
            phases = self._clock.take()
            turns.end(records[-1]["loss"] if records else None, phases)
        destroy_mesh()


def build(case: Case, folder: Path, parallel: dict[str, Any]) -> RandomRun:
    """Build the models that the case has saved."""
    changes: dict[str, Any] = {"parallel": parallel, "distill": {"beta": BETA, "temperature": 1.0}, "train": TRAIN}
    if case.has_lora:
        changes["lora"] = {"lora_rank": LORA["rank"], "lora_alpha": LORA["alpha"], "lora_dropout": 0.0}
    return RandomRun.build(changes, folder / "student", folder / "teacher")


def microbatches_of(case: Case, rank: int, ranks: int) -> list[Microbatch]:
    """Return the microbatches of one data-parallel rank."""
    samples = [_sample(row, index) for index, row in enumerate(case.rows())]
    return [collate(group, pad_multiple=1) for group in groups(samples[rank::ranks], case.microbatch_rows)]


def _sample(row: np.ndarray, index: int) -> Sample:
    trained = np.arange(len(row)) >= prompt_length(len(row))
    return Sample(input_ids=row, labels=shift_labels(row, trained), source="dataset", row_id=index)
