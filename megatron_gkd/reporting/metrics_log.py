"""The metrics of a run: metrics.jsonl, and the same numbers as TensorBoard events."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from megatron_gkd.runtime.disk import find_free_path, replace_text


class MetricsLog:
    """Append records to `output_dir/metrics.jsonl` and to the TensorBoard events in `output_dir/tensorboard`.

    An earlier run's file and events in the same folder are kept: they become `metrics.jsonl.1` and `tensorboard.1`,
    those of the next run `.2`, and so on; the highest number is the latest of them.

    Args:
        output_dir: folder of both.
        tensorboard: whether to write events.
        last_step: the newest step of a run that is resumed, whose records are continued, without those of later steps;
            None for a new run.
    """

    def __init__(self, output_dir: str | Path, tensorboard: bool = True, last_step: int | None = None) -> None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self._file = open_records(self.path, last_step)
        self._writer = None
        if last_step is None:
            rotate(folder / "tensorboard")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Also for a new run: TensorBoard removes nothing at the first start that it finds.
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=(last_step or 0) + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one record: a flat mapping of names to numbers, text or None; `step` is required.

        A number that isn't finite becomes null. With `"split": "validation"` the numbers go to TensorBoard's
        `validation/`, otherwise to `train/`.
        """
        plain = {name: _plain(value) for name, value in record.items()}
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()
        if self._writer is None:
            return
        split = plain.get("split") or "train"
        for name, value in plain.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(f"{split}/{name}", value, plain["step"])
        self._writer.flush()

    def write_text(self, tag: str, markdown: str, step: int) -> None:
        """Write a text to TensorBoard alone."""
        if self._writer is not None:
            self._writer.add_text(tag, markdown, step)
            self._writer.flush()

    def close(self) -> None:
        """Close the file and the events."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: the item of a one-element tensor or NumPy scalar, null for NaN and infinities."""
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_records(path: Path, last_step: int | None) -> TextIO:
    """Open a file of JSON lines to append to.

    Without `last_step` an earlier file is moved out of the way. With it the records of steps up to `last_step` stay;
    later ones, and a line that was not written whole, are removed.
    """
    if last_step is None:
        rotate(path)
        return path.open("x", encoding="utf-8")
    kept = [line for line in _lines(path) if (step := _step_of(line)) is not None and step <= last_step]
    replace_text(path, "".join(kept))
    return path.open("a", encoding="utf-8")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError):
        return None


def rotate(path: Path) -> None:
    """Move `path` out of the way, to the first number that is free."""
    if path.exists():
        path.rename(find_free_path(path))
