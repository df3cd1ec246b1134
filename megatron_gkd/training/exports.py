"""Where Hugging Face exports go, when they are due, and which are kept."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from megatron_gkd.reporting.metrics_log import rotate


@dataclass(frozen=True)
class Exports:
    """The exports of one run. Only what this run has made is ever replaced or deleted.

    Attributes:
        interval: steps between exports; None: at the end only.
        total_limit: how many of this run's step exports stay, the newest; None: all.
    """

    output_dir: Path
    interval: int | None = None
    total_limit: int | None = None
    _made: list[Path] = field(default_factory=list, init=False)

    @property
    def final_directory(self) -> Path:
        return self.output_dir / "hf"

    def step_directory(self, step: int) -> Path:
        return self.output_dir / f"hf-step-{step:06d}"

    def is_due(self, step: int) -> bool:
        return self.interval is not None and step % self.interval == 0

    def claim(self, directory: Path, *, is_main: bool) -> None:
        """Make `directory`, one of the above, this run's own, before it exports there.

        An earlier run's export in that place is kept: it becomes `hf.1`, the next one `hf.2`, and so on.
        """
        if directory in self._made:
            return
        self._made.append(directory)
        if is_main:
            rotate(directory)

    def forget_old(self, is_main: bool) -> None:
        """Delete all but the newest `total_limit` step exports of this run."""
        if not is_main or self.total_limit is None:
            return
        steps = [path for path in self._made if path != self.final_directory]
        for path in steps[: -self.total_limit]:
            shutil.rmtree(path, ignore_errors=True)
            self._made.remove(path)
