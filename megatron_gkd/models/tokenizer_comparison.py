"""Compare the tokenizers of student and teacher by the bytes of each id, and report what differs.

Distributions are compared id by id, so that an id must be the same token in both. Teachers of the student's family
often have other control tokens: those of DeepSeek-R1-Distill-Qwen take the ids of Qwen's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from megatron_gkd.errors import UserError
from megatron_gkd.models.token_bytes import TokenBytes, show
from megatron_gkd.reporting.logging import LOGGER
from megatron_gkd.runtime.disk import replace_text

PROBES = ("The 12 quick brown foxes jump over 345 lazy dogs.", 'x = f(y) != "naïve"\n\t# 中文, émigré, 🙂')
_SHOWN = {"strict": 3, "warn": 20}

Mode = Literal["strict", "warn"]


@dataclass(frozen=True)
class Difference:
    """An id that is another token, or a text that has other ids.

    Attributes:
        subject: "id 7", or the text.
        student: what the student's tokenizer makes of it.
        teacher: what the teacher's makes of it.
    """

    subject: str
    student: str
    teacher: str

    def line(self) -> str:
        """Return the difference as a clause."""
        return f"{self.subject} is {self.student} for the student and {self.teacher} for the teacher"


def compare_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> list[Difference]:
    """Return the ids that both define and decode differently, by id, and then plain texts whose ids differ."""
    ours, theirs = TokenBytes.from_tokenizer(student).of_id, TokenBytes.from_tokenizer(teacher).of_id
    found = [
        Difference(f"id {index}", show(ours[index]), show(theirs[index]))
        for index in sorted(ours.keys() & theirs.keys())
        if ours[index] != theirs[index]
    ]
    for text in PROBES:
        ids = [list(one.encode(text, add_special_tokens=False)) for one in (student, teacher)]
        if ids[0] != ids[1]:
            found.append(text_difference(text, *ids))
    return found


def text_difference(text: str, student: Sequence[int], teacher: Sequence[int]) -> Difference:
    """Return the difference of a text whose ids differ, from the first other one on."""
    shorter = min(len(student), len(teacher))
    first = next((place for place in range(shorter) if student[place] != teacher[place]), shorter)
    ours, theirs = (f"ids {list(ids[first : first + 4])}" for ids in (student, teacher))
    return Difference(f"token {first} of {show(text.encode())}", ours, theirs)


def report_differences(
    differences: Sequence[Difference], teacher: str, mode: Mode, file: Path | None = None, *, is_whole: bool = True
) -> None:
    """Refuse a teacher whose tokenizer differs, or warn of it.

    Args:
        differences: of its tokenizer from the student's.
        teacher: its key and value in the recipe, or its address.
        mode: teacher.check_tokenizers.
        file: where a warning writes the whole list; None, or one in a folder that does not exist, for nowhere.
        is_whole: whether there are no other differences.

    Raises:
        UserError: there are differences and `mode` is strict.
    """
    if not differences:
        return
    count, shown = len(differences), _SHOWN[mode]
    lines = [one.line() for one in differences]
    text = (
        f"{teacher}: its tokenizer is not the student's: {'' if is_whole else 'at least '}{count} "
        f"difference{'s' if count > 1 else ''}, {'the first are: ' if count > shown else ''}{'; '.join(lines[:shown])}"
    )
    if mode == "strict":
        raise UserError(
            f"{text}; their distributions cannot be compared at these ids: name a teacher of the student's family, or "
            "train all the same with teacher.check_tokenizers = warn"
        )
    if file is not None and file.parent.is_dir():
        text += f"; {_write(file, [f'{teacher}:', *lines])}"
    LOGGER.warning("%s; these ids are compared as if they were the same tokens (teacher.check_tokenizers = warn)", text)


def list_file(output_dir: str, place: str) -> Path:
    """Return the path of a teacher's list. `place`: the teacher's key in the recipe."""
    return Path(output_dir) / f"tokenizer_differences{place.removeprefix('teacher')}.txt"


def _write(file: Path, lines: Sequence[str]) -> str:
    """Write the list, and return where it is."""
    try:
        replace_text(file, "".join(f"{line}\n" for line in lines))
    except OSError as error:
        return f"the list can't be written to {file} ({error})"
    return f"the list is in {file}"
