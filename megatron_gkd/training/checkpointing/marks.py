"""The best and the last checkpoint of a run, and the links that name them.

Both depend on the checkpoints alone, so that they survive a resume. Needs neither torch nor Megatron.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_gkd.errors import UserError
from megatron_gkd.training.checkpointing.folder import CheckpointFolder, read_run

BEST, LAST = "best", "last"


@dataclass
class Marks:
    """The links `best` and `last` in a folder of checkpoints, each to one of its checkpoints."""

    folder: CheckpointFolder
    _has_failed: bool = field(default=False, init=False)

    def best(self) -> int | None:
        """Return the first step with the lowest validation divergence; None where no step has one.

        It is the divergence at the step of the checkpoint, or the loss where there is no teacher.
        """
        scores = {step: score for step in self.folder.steps() if (score := self._score(step)) is not None}
        return min(scores, key=scores.__getitem__, default=None)

    def last(self) -> int | None:
        """Return the newest step."""
        return max(self.folder.steps(), default=None)

    def of(self, step: int) -> list[str]:
        """Return the names of a step: none, one or both."""
        return [name for name, marked in ((BEST, self.best()), (LAST, self.last())) if marked == step]

    def update(self) -> Iterator[str]:
        """Update the links. Yield a line if they can't be written, the first time only."""
        try:
            for name, step in ((BEST, self.best()), (LAST, self.last())):
                _point(self.folder.path / name, None if step is None else self.folder.final(step))
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                yield f"{self.folder.path}: the links {BEST} and {LAST} can't be kept ({error}); training continues"

    def _score(self, step: int) -> float | None:
        try:
            score = read_run(self.folder.final(step)).get("validation")
        except UserError:
            return None
        return score if isinstance(score, int | float) and math.isfinite(score) else None


def _point(link: Path, target: Path | None) -> None:
    """Make `link` a relative link to `target` beside it, in one step; without a target remove it."""
    if target is None:
        link.unlink(missing_ok=True)
        return
    new = link.with_name(f"{link.name}.new")
    new.unlink(missing_ok=True)
    os.symlink(target.name, new)
    new.replace(link)
