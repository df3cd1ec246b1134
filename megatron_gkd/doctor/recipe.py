"""The recipe's own checks, as findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_gkd.config.checks import CommandChecks
from megatron_gkd.config.errors import RecipeError
from megatron_gkd.config.load import load
from megatron_gkd.doctor.finding import Finding
from megatron_gkd.doctor.subject import Subject

_VALUES_ALONE = CommandChecks(has_own=True)


def open_subject(path: str | None, overrides: Sequence[str], nproc: int) -> Subject:
    """Return what is to be checked; the recipe's mistakes become findings, and end nothing.

    Its folders, models and servers are checked as long as each key has an allowed value.
    """
    if path is None:
        return Subject(nproc=nproc)
    try:
        return Subject(path, load(path, overrides, world_size=nproc), nproc=nproc)
    except RecipeError as error:
        problems = tuple(error.problems)
    try:
        return Subject(path, load(path, overrides, world_size=nproc, command=_VALUES_ALONE), problems, nproc)
    except RecipeError:
        return Subject(path, None, problems, nproc)


def find_recipe(subject: Subject) -> Iterator[Finding]:
    """Report the problems of the recipe."""
    if subject.path is None:
        return
    for problem in subject.problems:
        yield Finding(
            "recipe",
            "failed",
            f"{subject.path}: {problem}",
            f"see: megatron-gkd check {subject.path} --nproc {subject.nproc}",
        )
    if not subject.problems:
        processes = f"{subject.nproc} process" + ("es" if subject.nproc > 1 else "")
        yield Finding("recipe", "ok", f"{subject.path} fits {processes}")
