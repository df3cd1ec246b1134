"""Split a shell script into characters, words and operators: quotes, escapes, comments and continued lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_gkd.errors import UserError

_OPERATORS = re.compile(r"\d*(?:>>|>&|<<<|<<-?|[<>])|&&|\|\||;;|[;|&()\n]")
_SPACE = " \t"


class ScriptProblem(UserError):
    """A text that is no shell script. The message begins with the line's number."""


@dataclass
class Word:
    """A word as it is written.

    Attributes:
        line: the number of its line, from 1.
        parts: its pieces in order: the text, and how it is quoted: "'", '"', or "" for not at all.
    """

    line: int
    parts: list[tuple[str, str]] = field(default_factory=list)

    @property
    def plain(self) -> str:
        """The text without quotes, before variables have values."""
        return "".join(text for text, _ in self.parts)


@dataclass(frozen=True)
class Operator:
    """What ends a command or redirects it.

    Attributes:
        line: the number of its line, from 1.
        text: the operator; a newline for the end of a line.
    """

    line: int
    text: str


def split_script(text: str) -> Iterator[Word | Operator]:
    """Yield the words and operators of a script.

    Raises:
        ScriptProblem: a quote or bracket is not closed.
    """
    position, line = 0, 1
    word: Word | None = None
    while position < len(text):
        char = text[position]
        if text.startswith("\\\n", position):
            position, line = position + 2, line + 1
            continue
        operator = _OPERATORS.match(text, position) if word is None or not char.isdigit() else None
        is_array = char == "(" and word is not None and word.plain.endswith("=")
        if char in _SPACE or operator or (char == "#" and word is None):
            if is_array:
                assert word is not None
                end = _closing(text, position, line)
                word.parts.append((text[position : end + 1], "array"))
                line, position = line + text.count("\n", position, end), end + 1
                continue
            if word is not None:
                yield word
                word = None
            if char == "#":
                position = (text + "\n").index("\n", position)
            elif operator:
                yield Operator(line, operator[0])
                line, position = line + operator[0].count("\n"), operator.end()
            else:
                position += 1
            continue
        word = word or Word(line)
        piece, quote, end = _piece(text, position, line)
        word.parts.append((piece, quote))
        line, position = line + text.count("\n", position, end), end
    if word is not None:
        yield word


def _piece(text: str, position: int, line: int) -> tuple[str, str, int]:
    """Return the piece of a word at a position, how it is quoted, and where it ends."""
    char = text[position]
    if char == "\\":
        return text[position + 1 : position + 2], "'", position + 2
    if char == "'":
        end = text.find("'", position + 1)
        if end < 0:
            raise ScriptProblem(f"line {line}: a quote (') is not closed")
        return text[position + 1 : end], "'", end + 1
    if char == '"':
        return _double_quoted(text, position, line)
    if text.startswith(("$(", "${"), position):
        end = _closing(text, position + 1, line)
        return text[position : end + 1], "", end + 1
    return char, "", position + 1


def _double_quoted(text: str, position: int, line: int) -> tuple[str, str, int]:
    """Return the text in double quotes; escaped dollars are left to the quoting."""
    pieces, index = [], position + 1
    while index < len(text) and text[index] != '"':
        if text[index] == "\\" and index + 1 < len(text) and text[index + 1] in '"\\$`\n':
            escaped = text[index + 1]
            pieces.append("" if escaped == "\n" else "\0" if escaped == "$" else escaped)
            index += 2
        else:
            pieces.append(text[index])
            index += 1
    if index >= len(text):
        raise ScriptProblem(f'line {line}: a quote (") is not closed')
    return "".join(pieces), '"', index + 1


def _closing(text: str, position: int, line: int) -> int:
    """Return the position of the bracket that closes the one at `position`, past quotes."""
    pairs, depth, quote = {"(": ")", "{": "}"}, 0, ""
    opening = text[position]
    for index in range(position, len(text)):
        char = text[index]
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char == opening:
            depth += 1
        elif char == pairs[opening]:
            depth -= 1
            if not depth:
                return index
    raise ScriptProblem(f"line {line}: a bracket ({opening}) is not closed")
