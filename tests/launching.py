"""Launchers that are forked from a process with the imports done, and launches of small programs.

Their ranks are processes of their own. Those of small programs report failures as the command line does, without torch.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

from world import start_process

ROOT = Path(__file__).parents[1]
LAUNCHER = """
import sys
from megatron_gkd import cli
from megatron_gkd.launch import deadlines
from megatron_gkd.launch.launcher import launch
from megatron_gkd.launch.options import take

deadlines.ENDS_BY_ITSELF_S = 5.0

def start(arguments):
    options, command = take("recipe.yaml", arguments)
    return launch(options, [sys.executable, *command])

cli._dispatch = start
cli.run()
"""
RANK = """
import os, pathlib, signal, sys, time
from megatron_gkd import cli
from megatron_gkd.errors import RunStopped, UserError

rank = int(os.environ["RANK"])
def note(name, text):
    with open(f"{{name}}-{{rank}}", "a") as file:
        file.write(f"{{text}}\\n")

def work(arguments):
    note("pid", os.getpid())
    {body}
    return 0

cli._dispatch = work
cli.run()
"""
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "LOGLEVEL")


def environment() -> dict[str, str]:
    """Return the variables of a process that no launcher has started, and that finds the package."""
    outside = {name: value for name, value in os.environ.items() if name not in _LAUNCHED}
    return outside | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def write_rank(folder: Path, body: str) -> None:
    """Write the program of a rank, whose work is `body`."""
    (folder / "rank.py").write_text(RANK.format(body=textwrap.dedent(body).strip().replace("\n", "\n    ")))


class Forked:
    """A program in a forked process, with what tests use of `subprocess.Popen`."""

    def __init__(self, folder: Path, program: str, *arguments: str, name: str, variables: dict[str, str] | None = None):
        """Start it.

        Args:
            folder: the working folder.
            program: a file in `folder`, or a module.
            arguments: of the program.
            name: of the files in `folder` that get its output: NAME.out and NAME.err.
            variables: all environment variables; `environment()` by default.
        """
        self._process = start_process(_run_program, folder, program, arguments, name, variables or environment())
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked program", timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run_program(folder: Path, program: str, arguments: tuple[str, ...], name: str, variables: dict[str, str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    for descriptor, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    multiprocessing.set_start_method(None, force=True)  # a process of a forkserver would start others by one, too
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def start(folder: Path, *options: str, name: str = "launcher") -> Forked:
    """Start `rank.py` of `folder` by a launcher in a session of its own; its output goes to files called `name`."""
    (folder / "launch.py").write_text(LAUNCHER)
    return Forked(folder, "launch.py", *options, "rank.py", name=name)


def run(folder: Path, body: str, *options: str) -> tuple[int, str]:
    """Launch ranks whose work is `body`; return the exit code and what was written to stderr."""
    write_rank(folder, body)
    launcher = start(folder, *(options or ("--nproc", "2")))
    code = finish(launcher)
    return code, (folder / "launcher.err").read_text()


def finish(process: subprocess.Popen | Forked, seconds: float = 90) -> int:
    try:
        return process.wait(seconds)
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.02)


def notes(folder: Path, name: str, rank: int) -> list[str]:
    """Return the lines that `rank` has noted under `name`."""
    file = folder / f"{name}-{rank}"
    return file.read_text().split() if file.exists() else []


def is_alive(pid: str) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
