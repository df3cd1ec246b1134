"""Read the commands of a shell script with its variables: assignments, exports, arrays, defaults and sums."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_gkd.migration.script_text import Word, split_script

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_VARIABLE = re.compile(
    r"\$\(\((?P<sum>.*?)\)\)|\$\{(?P<name>\w+)(?:(?P<how>:?[-=])(?P<default>[^{}]*))?\}|\$(?P<bare>[A-Za-z_]\w*)"
    r"|\$\{(?P<array>\w+)\[[@*]\]\}",
    re.DOTALL,
)
_HERE_DOCUMENT = re.compile(r"(?<!<)<<-?\s*[\"']?([A-Za-z_]\w*)[\"']?")
_UNKNOWN = re.compile(r"\$[\w@*({]|`")
_DECLARATIONS = ("export", "declare", "readonly", "local", "typeset")
_SUMS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


@dataclass(frozen=True)
class ShellCommand:
    """A command of a script.

    Attributes:
        line: the number of its first line, from 1.
        words: the program and its arguments.
        environment: the variables that are exported, and those before the command.
    """

    line: int
    words: tuple[str, ...]
    environment: dict[str, str]


def is_unknown(text: str) -> bool:
    """Return whether a word holds a variable or command that only a shell can expand."""
    return _UNKNOWN.search(text) is not None


def read_commands(text: str) -> Iterator[ShellCommand]:
    """Yield the commands of a script in order.

    Raises:
        ScriptProblem: the text is no shell script.
    """
    state = _State()
    for words in _simple_commands(text):
        command = state.run(words)
        if command is not None:
            yield command


def _simple_commands(text: str) -> Iterator[list[Word]]:
    """Yield the words between operators, without redirections and their files."""
    words: list[Word] = []
    is_file = False  # whether the next word is that of a redirection
    for token in split_script(_without_here_documents(text)):
        if isinstance(token, Word):
            if not is_file:
                words.append(token)
            is_file = False
            continue
        is_file = token.text.lstrip("0123456789").startswith(("<", ">"))
        if not is_file:
            if words:
                yield words
            words = []
    if words:
        yield words


def _without_here_documents(text: str) -> str:
    """Return a script with empty lines in place of the texts between `<<END` and END."""
    lines, end = [], None
    for line in text.split("\n"):
        if end is not None:
            end = None if line.strip() == end else end
            lines.append("")
            continue
        found = _HERE_DOCUMENT.search(line)
        end = found[1] if found and not line.lstrip().startswith("#") else None
        lines.append(line[: found.start()] if found and end else line)
    return "\n".join(lines)


@dataclass
class _State:
    """The variables at a place of the script."""

    variables: dict[str, str] = field(default_factory=dict)
    arrays: dict[str, list[str]] = field(default_factory=dict)
    exported: set[str] = field(default_factory=set)

    def run(self, words: list[Word]) -> ShellCommand | None:
        """Return the command of the words; None for assignments, which are kept."""
        declares = words[0].plain in _DECLARATIONS
        assigned: dict[str, str] = {}
        index = int(declares)
        while index < len(words) and (found := _ASSIGNMENT.fullmatch(words[index].plain)):
            self._assign(words[index], found, assigned)
            index += 1
        if declares or index == len(words):
            self.variables |= assigned
            names = {word.plain.partition("=")[0] for word in words[1:]} if words[0].plain == "export" else set()
            self.exported |= names
            return None
        environment = {name: self.variables[name] for name in self.exported if name in self.variables} | assigned
        expanded = [text for word in words[index:] for text in self.expand(word)]
        return ShellCommand(words[index].line, tuple(expanded), environment) if expanded else None

    def _assign(self, word: Word, found: re.Match[str], assigned: dict[str, str]) -> None:
        name, plus = found[1], found[2]
        array = next((text for text, quote in word.parts if quote == "array"), None)
        if array is not None:
            items = [item for one in _simple_words(array[1:-1]) for item in self.expand(one)]
            self.arrays[name] = [*self.arrays.get(name, []), *items] if plus else items
            return
        whole = "".join(
            text if quote == "'" else self._substitute(text).replace("\0", "$") for text, quote in _merged(word)
        )
        value = whole.partition("=")[2]
        assigned[name] = self.variables.get(name, "") + value if plus else value

    def expand(self, word: Word) -> list[str]:
        """Return the words that a word becomes; variables without quotes are split at spaces."""
        done, current, is_quoted = [], "", False
        for text, quote in _merged(word):
            array = _VARIABLE.fullmatch(text)
            if quote == "'":
                current, is_quoted = current + text, True
            elif array and array["array"] in self.arrays:
                items = self.arrays[array["array"]]
                done += [current + items[0], *items[1:-1]] if len(items) > 1 else []
                current = items[-1] if len(items) > 1 else current + "".join(items)
                is_quoted = is_quoted or bool(items)
            elif quote == '"':
                current, is_quoted = current + self._substitute(text).replace("\0", "$"), True
            else:
                found = self._substitute(text)
                if found == text:
                    current += text
                    continue
                first, *others = found.split() or [""]
                current += first
                for other in others:
                    done.append(current)
                    current = other
        return [*done, current] if current or is_quoted else done

    def _substitute(self, text: str) -> str:
        """Return a text with the values of the variables that the script sets; others stay as they are."""

        def value(found: re.Match[str]) -> str:
            if found["sum"] is not None:
                return self._sum(found["sum"], found[0])
            name = found["name"] or found["bare"] or ""
            if name in self.variables and (self.variables[name] or not (found["how"] or "").startswith(":")):
                return self.variables[name]
            if found["default"] is not None:
                return self._substitute(found["default"].strip("\"'"))
            return found[0]

        return _VARIABLE.sub(value, text)

    def _sum(self, text: str, whole: str) -> str:
        """Return the value of an integer expression; the text itself where it is another one."""
        known = re.sub(r"\$?\{?\b([A-Za-z_]\w*)\b\}?", lambda found: self.variables.get(found[1], found[0]), text)
        try:
            return str(_compute(ast.parse(known.replace("/", "//").strip(), mode="eval").body))
        except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
            return whole


def _compute(node: ast.expr) -> int:
    """Return the value of a sum or product of integers.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _SUMS:
        result: int = _SUMS[type(node.op)](_compute(node.left), _compute(node.right))
        return result
    raise ValueError


def _simple_words(text: str) -> list[Word]:
    return [token for token in split_script(text) if isinstance(token, Word)]


def _merged(word: Word) -> list[tuple[str, str]]:
    """Return the pieces of a word, those side by side with the same quoting joined."""
    merged: list[tuple[str, str]] = []
    for text, quote in word.parts:
        is_whole = text.startswith(("$(", "${"))
        if merged and merged[-1][1] == quote == "" and not is_whole and not merged[-1][0].startswith(("$(", "${")):
            merged[-1] = (merged[-1][0] + text, quote)
        else:
            merged.append((text, quote))
    return merged
