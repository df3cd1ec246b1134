"""Run the checks one after the other, each within its time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from megatron_gkd.doctor import gradient, installation, libraries, limits, network, recipe, servers, storage, versions
from megatron_gkd.doctor.finding import Check, Finding
from megatron_gkd.doctor.subject import Subject
from megatron_gkd.doctor.torch_facts import SECONDS


def checks_of(subject: Subject) -> list[Check]:
    """Return the checks of a machine and a recipe, in the order of the report."""
    return [
        Check("python", versions.find_python),
        Check("versions", versions.find_versions),
        Check("torch", installation.find_torch, SECONDS + 20),
        Check("compiled kernels", installation.find_kernels),
        *map(libraries.check_of, libraries.LIBRARIES),
        Check("GPUs", installation.find_gpus, 40.0),
        Check("backends", installation.find_backends),
        Check("shared memory", limits.find_shared_memory),
        Check("locked memory", limits.find_locked_memory),
        Check("open files", limits.find_open_files),
        *storage.checks_of(subject),
        Check("hub", network.find_hub, 15.0, late="warning"),
        Check("host name", network.find_host_name),
        Check("network interfaces", network.find_interfaces),
        Check("recipe", recipe.find_recipe),
        *servers.checks_of(subject),
        Check(gradient.NAME, gradient.find_gradient, gradient.SECONDS + 20),
    ]


def examine(subject: Subject, checks: Sequence[Check] | None = None) -> Iterator[Finding]:
    """Yield what the checks find, as they find it."""
    for check in checks_of(subject) if checks is None else checks:
        yield from _run(check, subject)


def _run(check: Check, subject: Subject) -> list[Finding]:
    """Return a check's findings; a failed one if it raises or does not end in time, in a thread that is left behind."""
    found: list[Finding] = []
    problems: list[str] = []

    def work() -> None:
        try:
            found.extend(check.find(subject))
        except Exception as error:  # one check that can't be made must not hide the others
            problems.append(f"the check itself failed: {type(error).__name__}: {error}".splitlines()[0])

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(check.seconds)
    if thread.is_alive():
        remedy = "look for a file system or a network that does not respond"
        return [Finding(check.name, check.late, f"did not end within {check.seconds:g} s", remedy)]
    return [*found, *(Finding(check.name, "failed", text, "report it as a bug") for text in problems)]
