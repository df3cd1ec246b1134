"""Where Hugging Face exports go, when they are due, and which are kept."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Exports:
    """`save_interval` steps between exports (None: at the end only), of which the newest `save_total_limit` stay."""

    output_dir: Path
    save_interval: int | None = None
    save_total_limit: int | None = None

    @property
    def final_directory(self) -> Path:
        return self.output_dir / "hf"

    def step_directory(self, step: int) -> Path:
        return self.output_dir / f"hf-step-{step:06d}"

    def is_due(self, step: int) -> bool:
        return self.save_interval is not None and step % self.save_interval == 0

    def forget_old(self, is_main: bool) -> None:
        """Delete all but the newest `save_total_limit` step exports."""
        if not is_main or self.save_total_limit is None:
            return
        exports = sorted(path for path in self.output_dir.glob("hf-step-*") if path.name.count(".") == 0)
        for path in exports[: -self.save_total_limit]:
            shutil.rmtree(path)
