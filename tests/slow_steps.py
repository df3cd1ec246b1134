"""Runs whose steps take longer on demand, so that a test can interrupt them between two steps."""

from __future__ import annotations

from pathlib import Path

PLUGIN = "slow_steps_plugin.py"
_TEXT = """
import time
from pathlib import Path
from megatron_gkd.training.trainer import Trainer

def write(self, record, completions, write=Trainer.write):
    write(self, record, completions)
    if Path("seconds").exists():
        time.sleep(float(Path("seconds").read_text()))

Trainer.write = write
"""


def write_plugin(folder: Path) -> None:
    """Write the plugin of `data.external_plugins` to the working folder of a run."""
    (folder / PLUGIN).write_text(_TEXT)


def slow_down(folder: Path, seconds: float) -> None:
    """Let each rank wait after each step, also in a run that starts later."""
    (folder / "seconds").write_text(str(seconds))


def speed_up(folder: Path) -> None:
    (folder / "seconds").unlink()


def num_steps(run: Path) -> int:
    """Return the number of training steps in metrics.jsonl."""
    file = run / "metrics.jsonl"
    return file.read_text().count('"grad_norm"') if file.exists() else 0
