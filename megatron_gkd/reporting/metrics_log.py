"""metrics.jsonl and TensorBoard: the same numbers twice, once for programs and once for a browser."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any


class MetricsLog:
    """Appends records to `output_dir/metrics.jsonl` and to the TensorBoard events in `output_dir/tensorboard`.

    A former run's file and events in the same folder are kept: they become `metrics.jsonl.1`, `tensorboard.1`, the next
    run's `.2`, and so on; the highest number is the latest of them.
    """

    def __init__(self, output_dir: str | Path, tensorboard: bool = True) -> None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        rotate(self.path)
        self._file = self.path.open("x", encoding="utf-8")
        self._writer = None
        rotate(folder / "tensorboard")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"))

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
        """To TensorBoard only."""
        if self._writer is not None:
            self._writer.add_text(tag, markdown, step)
            self._writer.flush()

    def close(self) -> None:
        """Close both; further records are an error."""
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
    """A Python value for JSON; one-element tensors and NumPy scalars give their item."""
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rotate(path: Path) -> None:
    """Move `path` out of the way, to the first number that is free."""
    if not path.exists():
        return
    number = 1
    while (kept := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(kept)
