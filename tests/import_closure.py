"""Find what importing some of this repository's files needs, without importing them."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEARCHED = (ROOT, ROOT / "tests", ROOT / "scripts")


def third_party(paths: list[Path]) -> set[str]:
    """Return the packages that importing the files needs: names that are neither Python's nor this repository's."""
    waiting, seen, found = list(paths), set(), set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in _imported(path):
            files = _files(name)
            waiting += files
            top = name.split(".")[0]
            if not files and top not in sys.stdlib_module_names and not _files(top):
                found.add(top)
    return found


def _imported(path: Path) -> Iterator[str]:
    for node in _executed(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports are not followed"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _executed(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that run when a module is imported, except below `if TYPE_CHECKING` and in `try`."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If) and "TYPE_CHECKING" not in ast.unparse(statement.test):
            yield from _executed(statement.body)


def _files(name: str) -> list[Path]:
    """Return the files that importing `name`, a module or something in one, runs."""
    parts = name.split(".")
    found = []
    for folder in SEARCHED:
        for end in range(1, len(parts) + 1):
            place = folder.joinpath(*parts[:end])
            found += [file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()]
        if found:
            break
    return found
