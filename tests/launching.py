"""Launches of small programs, which report their failures as the command line does, without torch in their ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

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


def start(folder: Path, *options: str, name: str = "launcher") -> subprocess.Popen:
    """Start `rank.py` of `folder` by a launcher in a session of its own; its output goes to files called `name`."""
    (folder / "launch.py").write_text(LAUNCHER)
    with open(folder / f"{name}.out", "w") as out, open(folder / f"{name}.err", "w") as err:
        return subprocess.Popen(
            [sys.executable, "launch.py", *options, "rank.py"],
            cwd=folder,
            env=environment(),
            stdout=out,
            stderr=err,
            start_new_session=True,
        )


def run(folder: Path, body: str, *options: str) -> tuple[int, str]:
    """Launch ranks whose work is `body`; return the exit code and what was written to stderr."""
    write_rank(folder, body)
    launcher = start(folder, *(options or ("--nproc", "2")))
    code = finish(launcher)
    return code, (folder / "launcher.err").read_text()


def finish(process: subprocess.Popen, seconds: float = 90) -> int:
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
