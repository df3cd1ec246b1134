"""Write the tables of measurements into README.md and docs/: python scripts/write_docs_tables.py [--check].

A page has `<!-- table: FILE | heading | columns -->` before a table and `<!-- end of table -->` behind it. FILE is
Markdown below scripts/; of several files that a pattern (`step_*.md`) matches, the newest by the date in the JSON file
beside it. Where there is none yet, the page says so. The table is the first one, or the first below the heading that is
`heading` or, if there is none, begins with it; `columns`, names divided by commas, selects some of its columns. Rows
without values are left out. With --check nothing is written, and the exit status is 1 where a page differs from the
files.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARKER = re.compile(r"<!-- table: (?P<source>.+?) -->\n(?P<table>.*?)<!-- end of table -->", re.DOTALL)

NOT_MEASURED = "Not measured yet.\n"


def pages() -> list[Path]:
    """Return the pages that may have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def update(text: str) -> str:
    """Return the text of a page with its tables as the files have them."""
    return MARKER.sub(
        lambda found: f"<!-- table: {found['source']} -->\n{_table(found['source'])}<!-- end of table -->", text
    )


def _table(source: str) -> str:
    pattern, heading, columns, *_ = [part.strip() for part in source.split("|")] + ["", ""]
    path = _newest(pattern)
    if path is None:
        return NOT_MEASURED
    lines = path.read_text(encoding="utf-8").splitlines()
    if heading:
        lines = lines[_line_of(heading, lines) :]
    rows = [_cells(line) for line in _first_table(lines)]
    if columns:
        chosen = [rows[0].index(name.strip()) for name in columns.split(",")]
        rows = [[row[index] for index in chosen] for row in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows if any(row[1:]))


def _line_of(heading: str, lines: Sequence[str]) -> int:
    """Return the index of the heading that is `heading`, or of the first that begins with it."""
    headings = {index: line.lstrip("# ") for index, line in enumerate(lines) if line.startswith("#")}
    exact = [index for index, text in headings.items() if text == heading]
    return (exact or [index for index, text in headings.items() if text.startswith(heading)])[0]


def _newest(pattern: str) -> Path | None:
    """Return the file that was measured last; None where there is none.

    Raises:
        FileNotFoundError: `pattern` names one file, which does not exist.
    """
    if "*" not in pattern:
        return ROOT / pattern
    return max(ROOT.glob(pattern), key=lambda path: (_date(path.with_suffix(".json")), path.name), default=None)


def _date(path: Path) -> str:
    return json.loads(path.read_text(encoding="utf-8"))["environment"]["date"] if path.exists() else ""


def _first_table(lines: Sequence[str]) -> Iterator[str]:
    is_inside = False
    for line in lines:
        if line.startswith("|"):
            is_inside = True
            yield line
        elif is_inside:
            return


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def main() -> int:
    """Write or check all pages; return the exit status."""
    differing = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        updated = update(text)
        if updated == text:
            continue
        differing.append(page.relative_to(ROOT))
        if "--check" not in sys.argv[1:]:
            page.write_text(updated, encoding="utf-8")
    for page in differing:
        print(f"{page}: {'tables differ from their files' if '--check' in sys.argv[1:] else 'written'}")
    return int(bool(differing) and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
