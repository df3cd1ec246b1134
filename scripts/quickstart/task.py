"""What the models of an experiment learn, and where its files are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it imports torch
    from quickstart.evaluate import Scores

HERE = Path(__file__).parent
OUT = Path("runs/quickstart")


@dataclass(frozen=True)
class Task:
    """What the models learn: rows, tokenizer, models with random weights, and the evaluation.

    Attributes:
        folder: where all but the runs is written.
        code: files of this package by which rows, tokenizer and models are made.
        evaluation_code: files of this package by which checkpoints are evaluated.
        teacher: the teacher's shape.
        student: the student's shape.
        test_rows: number of rows of the test split.
        write_data: writes the rows of all splits into a folder.
        write_tokenizer: writes the tokenizer into a folder, given the training file of the teacher.
        write_untrained: writes a model, given its folder, the tokenizer's, its shape and its seed.
        evaluate: scores the first checkpoint against the second, the teacher, given the folder of the rows.
    """

    folder: Path
    code: Sequence[Path]
    evaluation_code: Sequence[Path]
    teacher: Any
    student: Any
    test_rows: int
    write_data: Callable[[Path], None]
    write_tokenizer: Callable[[Path, Path], None]
    write_untrained: Callable[[Path, Path, Any, int], None]
    evaluate: Callable[[Path, Path, Path], Scores]

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def untrained(self) -> Path:
        return self.folder / "untrained"
