"""The task of arithmetic word problems."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quickstart import prepare
from quickstart.task import HERE, OUT, Task

if TYPE_CHECKING:
    from quickstart.evaluate import Scores


def _evaluate(checkpoint: Path, teacher: Path, data: Path) -> Scores:
    from quickstart.evaluate import evaluate

    return evaluate(checkpoint, teacher, list(prepare.read_problems(data / "test.jsonl")))


WORD_PROBLEMS = Task(
    folder=OUT,
    code=[HERE / name for name in ("problems.py", "prepare.py", "tokenizer.py")],
    evaluation_code=[HERE / name for name in ("evaluate.py", "problems.py")],
    teacher=prepare.TEACHER,
    student=prepare.STUDENT,
    test_rows=prepare.TEST_ROWS,
    write_data=prepare.write_data,
    write_tokenizer=prepare.write_tokenizer,
    write_untrained=prepare.write_untrained,
    evaluate=_evaluate,
)
