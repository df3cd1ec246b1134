"""Which rows of a source a split has: `#n`, and the validation rows of `split_dataset_ratio`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

_STREAM = 0x73656C  # keeps these draws apart from those of training, which start from the same seed


@dataclass(frozen=True)
class Chosen:
    """The chosen rows of a source.

    Attributes:
        rows: int64, indices of the rows that are used at least once, sorted.
        passes: how often all of them are used.
        rest: int64, indices of those that are used once more, sorted.
    """

    rows: np.ndarray
    passes: int
    rest: np.ndarray

    def order(self, rows: np.ndarray) -> np.ndarray | None:
        """Return the positions of `rows` that make up the split; None where each is used once.

        Args:
            rows: the index of the row that each sample was made of; rows may be missing or have several samples.
        """
        if self.passes == 1 and not len(self.rest):
            return None
        return np.concatenate([np.tile(np.arange(len(rows)), self.passes), np.flatnonzero(np.isin(rows, self.rest))])


@dataclass(frozen=True)
class Selection:
    """A function of the seed from the rows of a source to those of a split.

    Attributes:
        size: number of rows to draw; None: all.
        ratio: share of the drawn rows that validate.
        split: the rows to return.
        seed: of the run, non-negative.
        position: of the source in the recipe's list, so that sources draw apart from each other.
    """

    size: int | None = None
    ratio: float = 0.0
    split: Literal["train", "validation"] = "train"
    seed: int = 0
    position: int = 0

    @property
    def key(self) -> dict[str, Any] | None:
        """What the rows depend on; None where all rows of the source are used."""
        return None if self.size is None and not self.ratio else asdict(self)

    def choose(self, rows: np.ndarray) -> Chosen:
        """Choose among a source's rows.

        Below their number, `size` of them are drawn without replacement; above it, all are used in whole passes, and
        a sample fills the last one. Validation rows are drawn first, at least one, and are never among the others.

        Args:
            rows: int64, the indices of all rows.

        Raises:
            ValueError: no row is left to train on.
        """
        if self.key is None:
            return Chosen(rows, 1, np.zeros(0, np.int64))
        shuffled = np.random.Generator(np.random.PCG64([self.seed, _STREAM, self.position])).permutation(rows)
        size = len(rows) if self.size is None else self.size
        validating = max(1, int(min(size, len(rows)) * self.ratio)) if self.ratio else 0
        if self.ratio and min(size, len(rows)) < 2:
            raise ValueError(f"{min(size, len(rows))} rows cannot be divided into training and validation")
        if self.split == "validation" and self.ratio:
            return Chosen(np.sort(shuffled[:validating]), 1, np.zeros(0, np.int64))
        remaining, size = shuffled[validating:], size - validating
        if size < len(remaining):
            return Chosen(np.sort(remaining[:size]), 1, np.zeros(0, np.int64))
        passes, extra = divmod(size, len(remaining)) if len(remaining) else (1, 0)
        return Chosen(np.sort(remaining), passes, np.sort(remaining[:extra]))
