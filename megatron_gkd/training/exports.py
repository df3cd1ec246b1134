"""The folders of exports: when an export is due, where it goes, and which are kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_gkd.reporting.metrics_log import rotate


@dataclass(frozen=True)
class ExportFolders:
    """The folders that one export writes.

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
        """Command-line option of a run that starts from the exported weights."""
        return f"--model {self.checkpoint}" if self.adapters is None else f"--adapters {self.adapters}"

    def describe(self) -> list[str]:
        """Return a line for each folder, for the end of a run."""
        names = (("adapters", self.adapters), ("checkpoint", self.checkpoint))
        return [f"{name:<10} {path}" for name, path in names if path is not None]


@dataclass(frozen=True)
class Exports:
    """The exports of one run, which replaces and deletes only exports of its own.

    Attributes:
        output_dir: parent of the folders.
        interval: steps between exports; None: at the end only.
        total_limit: number of this run's newest step exports that are kept; None: all.
        has_checkpoint: whether an export has a whole Hugging Face checkpoint, in `hf`.
        has_adapters: whether an export has PEFT adapters, in `adapters`.
    """

    output_dir: Path
    interval: int | None = None
    total_limit: int | None = None
    has_checkpoint: bool = True
    has_adapters: bool = False
    _made: list[Path] = field(default_factory=list, init=False)

    @property
    def made(self) -> list[str]:
        """Names of this run's exports so far. A checkpoint holds them, so that a resumed run removes old ones."""
        return [path.name for path in self._made]

    def restore(self, made: Iterable[str]) -> None:
        """Continue from what `made` returned."""
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
        """Return whether there is an export after `step`."""
        return self.interval is not None and step % self.interval == 0

    def claim(self, folders: ExportFolders, *, is_main: bool) -> None:
        """Note `folders` as exports of this run, before it writes there.

        An earlier run's export at the same path is kept: it becomes `hf.1`, the next one `hf.2`, and so on.
        """
        for directory in folders:
            if directory not in self._made:
                self._made.append(directory)
                if is_main:
                    rotate(directory)

    def remove_old(self, *, is_main: bool) -> None:
        """Delete all but the newest `total_limit` step exports of this run."""
        if not is_main or self.total_limit is None:
            return
        last = set(self.final())
        for name in ("hf", "adapters"):
            steps = [path for path in self._made if path not in last and path.name.startswith(f"{name}-")]
            for path in steps[: -self.total_limit]:
                shutil.rmtree(path, ignore_errors=True)
                self._made.remove(path)
