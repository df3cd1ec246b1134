"""What is checked: this machine, and a recipe where one is named."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_gkd.config.schema import Recipe
from megatron_gkd.doctor.processes import Outcome
from megatron_gkd.doctor.torch_facts import TorchFacts, read_facts


@dataclass(frozen=True)
class Subject:
    """The machine, the recipe and the number of processes of a run.

    Attributes:
        path: the recipe's file; None without one.
        recipe: the recipe; None without one, or where its values can't be read.
        problems: what the recipe's own checks find.
        nproc: processes that the run has on this machine.
    """

    path: str | None = None
    recipe: Recipe | None = None
    problems: tuple[str, ...] = ()
    nproc: int = 1

    @cached_property
    def torch(self) -> TorchFacts | Outcome:
        """What torch reports in a process of its own, or how that process failed."""
        return read_facts()
