"""How many collectives and messages a step has under each layout, as a formula.

The letters of a formula: m microbatches of a data-parallel rank, L layers of the student, T layers of a local teacher
(of the student, where it teaches itself), c chunks of tokens of the loss in a microbatch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.collectives import CollectiveCounter, groups_of
from benchmarks.random_runs import RandomRun, save_model
from megatron_gkd.runtime.mesh import destroy_mesh

Formulas = dict[tuple[str, str], str]
LENGTH = 32
MICROBATCHES = (2, 4)
DENSE_LAYERS, EXPERT_LAYERS, TEACHER_LAYERS = 4, 2, 2
TP = {"tensor_model_parallel_size": 2}
SP = TP | {"sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
CP = {"context_parallel_size": 2}
EP = {"expert_model_parallel_size": 2}
SELF = {"teacher_model": None, "teacher_kind": "self", "teacher_ema": 0.9}
# The norm of the gradient, whether it is finite everywhere, whether the record was written.
WORLD: Formulas = {("world", "all_reduce"): "3"}
# One bucket of gradients; the parameters; the number of tokens and the metrics.
DATA: Formulas = {("dp_cp", "reduce_scatter"): "1", ("dp_cp", "all_gather"): "1", ("dp_cp", "all_reduce"): "2"}


@dataclass(frozen=True)
class Case:
    """A layout of two processes.

    Attributes:
        changes: what differs in the recipe.
        formulas: number of operations in a step, by group and operation. Messages are those of all ranks together.
        has_experts: whether the student is a mixture of experts.
    """

    changes: Mapping[str, Any]
    formulas: Formulas = field(default_factory=dict)
    has_experts: bool = False

    @property
    def layers(self) -> int:
        """Number of layers of the student."""
        return EXPERT_LAYERS if self.has_experts else DENSE_LAYERS

    def expected(self, microbatches: int) -> dict[tuple[str, str], int]:
        """Return the values of the formulas."""
        teacher = self.layers if self.changes.get("teacher") == SELF else TEACHER_LAYERS
        letters = {"m": microbatches, "L": self.layers, "T": teacher, "c": 1}
        return {key: evaluate(text, letters) for key, text in self.formulas.items()}


def _tensor(all_reduce: str, gathers: str = "m(1 + 2c)") -> Formulas:
    return {("tp", "all_gather"): gathers, ("tp", "all_reduce"): all_reduce} | WORLD


def _sequence(all_gather: str, reduce_scatter: str) -> Formulas:
    return {
        ("tp", "all_gather"): all_gather,
        ("tp", "reduce_scatter"): reduce_scatter,
        ("tp", "all_reduce"): "1",
    } | WORLD


def _pipeline(messages: str) -> Formulas:
    return {("pp", "send"): messages, ("pp", "broadcast"): "2", ("embedding", "all_reduce"): "1"} | WORLD


CASES: dict[str, Case] = {
    "TP2": Case({"parallel": TP}, _tensor("m(4L + 2 + 2T + 1) + 1")),
    "TP2, top-k": Case(
        {"parallel": TP, "distill": {"gkd_logits_topk": 5}}, _tensor("m(4L + 2 + 2T + 1) + 1", "m(1 + 3c)")
    ),
    "TP2, self teacher": Case({"parallel": TP, "teacher": SELF}, _tensor("m(4L + 2 + 2T + 1) + 1")),
    "TP2, LoRA": Case({"parallel": TP, "lora": {}}, _tensor("m(8L + 2 + 2T + 1)")),
    "TP2+SP": Case({"parallel": SP}, _sequence("m(6L + 2 + 2T + 1 + 1 + 2c)", "m(4L + 2 + 2T + 1)")),
    "TP2+SP, LoRA": Case({"parallel": SP, "lora": {}}, _sequence("m(10L + 1 + 2T + 1 + 1 + 2c)", "m(8L + 2 + 2T + 1)")),
    "PP2": Case({"parallel": PP}, _pipeline("m(2 + 2 + 2)")),
    "PP2xVPP2": Case({"parallel": PP | {"virtual_pipeline_model_parallel_size": 2}}, _pipeline("m(3 + 3 + 2)")),
    "CP2": Case({"parallel": CP}, {("cp", "all_gather"): "m(2L + 2T)", ("cp", "reduce_scatter"): "2mL"} | DATA | WORLD),
    "DP2": Case({}, DATA | WORLD),
    "DP2, overlapped": Case({"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}}, DATA | WORLD),
    # The gradient is whole, so that its norm needs no reduction.
    "DP2, optimizer not distributed": Case(
        {"parallel": {"distributed_optimizer": False}},
        {("dp_cp", "all_reduce"): "3", ("world", "all_reduce"): "2"},
    ),
    "EP2": Case(
        {"parallel": EP},
        {("ep", "all_gather"): "mL", ("ep", "all_to_all"): "6mL"} | DATA | WORLD,
        has_experts=True,
    ),
}


def evaluate(formula: str, letters: Mapping[str, int]) -> int:
    """Return the value of a formula such as `m(4L + 2) + 1`."""
    product = re.sub(r"(?<=[\w)])(?=[A-Za-z(])", "*", formula)
    return int(eval(product, {"__builtins__": {}}, dict(letters)))


@dataclass(frozen=True)
class Models:
    """The folders of the models of all cases."""

    dense: Path
    mixture: Path
    teacher: Path

    @classmethod
    def save(cls, folder: Path) -> Models:
        """Write them to a folder."""
        return cls(
            save_model(folder / "dense", DENSE_LAYERS),
            save_model(folder / "mixture", EXPERT_LAYERS, experts=4),
            save_model(folder / "teacher", TEACHER_LAYERS, hidden_size=48),
        )


def count(case: Case, models: Models, folder: Path) -> dict[int, Counter[tuple[str, str]]]:
    """Return what this rank sends in a step, by number of microbatches. All ranks must call it."""
    run = RandomRun.build(case.changes, models.mixture if case.has_experts else models.dense, models.teacher)
    trainer, groups = run.trainer(folder), groups_of(run.mesh)
    trainer.train_step(1, run.microbatches(2, LENGTH))  # overlapped gathers begin with the second step
    found = {}
    for step, microbatches in enumerate(MICROBATCHES, start=2):
        with CollectiveCounter(groups) as counter:
            trainer.train_step(step, run.microbatches(microbatches, LENGTH))
        found[microbatches] = counter.counts
    destroy_mesh()
    return found


def combine(ranks: list[Counter[tuple[str, str]]]) -> dict[tuple[str, str], int]:
    """Return the operations of a step from those of all its ranks, and the messages of all of them together."""
    keys = {key for rank in ranks for key in rank if key[1] != "recv"}
    return {key: (sum if key[1] == "send" else max)(rank[key] for rank in ranks) for key in sorted(keys)}
