"""Read the pages of the documentation: their code blocks, links, tables and inline code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from world import REPOSITORY

PAGES = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").glob("*.md"))]
_FENCE = re.compile(
    r"^(?P<fence>`{3,})(?P<language>\w*)[ ]*(?P<options>[^\n`]*)\n(?P<code>.*?)^(?P=fence)$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Attributes:
        language: the word behind the fence.
        title: the file that the block belongs into, by `title="..."`; None without one.
        code: its lines.
    """

    language: str
    title: str | None
    code: str


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """Return the fenced blocks of a page, in order; those of one language if it is given."""
    found = []
    for match in _FENCE.finditer(page.read_text(encoding="utf-8")):
        title = re.search(r'title="([^"]+)"', match["options"])
        if language in (None, match["language"]):
            found.append(Block(match["language"], title[1] if title else None, match["code"]))
    return found


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def table_rows(page: Path) -> list[list[str]]:
    """Return the cells of all tables' rows, without their lines of dashes."""
    lines = [line for line in prose(page).splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))] for line in lines]
    return [row for row in rows if not all(set(cell) <= set("-: ") for cell in row)]
