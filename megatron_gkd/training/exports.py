"""Where exports go, when they are due, and which are kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_gkd.reporting.metrics_log import rotate


@dataclass(frozen=True)
class ExportFolders:
    """What one export writes.

    Attributes:
        checkpoint: a whole Hugging Face checkpoint, with adapters merged; None: not written.
        adapters: PEFT adapters; None: not written.
    """

    checkpoint: Path | None = None
    adapters: Path | None = None

    def __iter__(self) -> Iterator[Path]:
        return (path for path in (self.adapters, self.checkpoint) if path is not None)

    def __str__(self) -> str:
        if self.adapters is None:
            return str(self.checkpoint)
        merged = "" if self.checkpoint is None else f" and {self.checkpoint} (adapters merged)"
        return f"{self.adapters} (PEFT adapters){merged}"

    @property
    def start_option(self) -> str:
        """The option of a run that starts from the exported weights."""
        return f"--model {self.checkpoint}" if self.adapters is None else f"--adapters {self.adapters}"

    def describe(self) -> str:
        """Return a line for each folder, as they stand at the end of a run."""
        names = (("adapters", self.adapters), ("checkpoint", self.checkpoint))
        return "\n".join(f"{name:<10} {path}" for name, path in names if path is not None)


@dataclass(frozen=True)
class Exports:
    """The exports of one run. Only what this run has made is ever replaced or deleted.

    Attributes:
        interval: steps between exports; None: at the end only.
        total_limit: how many of this run's step exports stay, the newest; None: all.
        has_checkpoint: exports have a whole Hugging Face checkpoint, in `hf`.
        has_adapters: exports have PEFT adapters, in `adapters`.
    """

    output_dir: Path
    interval: int | None = None
    total_limit: int | None = None
    has_checkpoint: bool = True
    has_adapters: bool = False
    _made: list[Path] = field(default_factory=list, init=False)

    @property
    def made(self) -> list[str]:
        """Names of this run's exports so far, for its checkpoint: a resumed run goes on to keep the newest of them."""
        return [path.name for path in self._made]

    def restore(self, made: Iterable[str]) -> None:
        """Take over what `made` returned."""
        self._made[:] = [self.output_dir / name for name in made]

    def final(self) -> ExportFolders:
        """Return where the export at the end of the run goes."""
        return self._folders("")

    def of_step(self, step: int) -> ExportFolders:
        """Return where the export after `step` goes."""
        return self._folders(f"-step-{step:06d}")

    def _folders(self, suffix: str) -> ExportFolders:
        return ExportFolders(
            self.output_dir / f"hf{suffix}" if self.has_checkpoint else None,
            self.output_dir / f"adapters{suffix}" if self.has_adapters else None,
        )

    def is_due(self, step: int) -> bool:
        return self.interval is not None and step % self.interval == 0

    def claim(self, folders: ExportFolders, *, is_main: bool) -> None:
        """Make `folders`, of one of the above, this run's own, before it exports there.

        An earlier run's export in such a place is kept: it becomes `hf.1`, the next one `hf.2`, and so on.
        """
        for directory in folders:
            if directory not in self._made:
                self._made.append(directory)
                if is_main:
                    rotate(directory)

    def forget_old(self, is_main: bool) -> None:
        """Delete all but the newest `total_limit` step exports of this run."""
        if not is_main or self.total_limit is None:
            return
        last = set(self.final())
        for name in ("hf", "adapters"):
            steps = [path for path in self._made if path not in last and path.name.startswith(f"{name}-")]
            for path in steps[: -self.total_limit]:
                shutil.rmtree(path, ignore_errors=True)
                self._made.remove(path)
