"""Start the command line in several ranks, as torchrun does, but forked from a process that has the imports done.

A launch has a session of its own: a launcher process with its ranks and whatever these start. The launcher ends the
other ranks when one fails: SIGTERM, then SIGKILL.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import multiprocessing
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ports import free_port
from world import forkserver

TERM_SECONDS = 2.0
"""From SIGTERM to SIGKILL; torchrun's 30 would be the same with more waiting."""
_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Launch:
    """One start of the command line.

    Attributes:
        arguments: of the command line, from the command on.
        processes: None: one process without a launcher's variables.
        folder: the ranks' working folder.
        logs: folder for what they print and for their exit codes; made anew.
        program: a script in `folder` in place of the package.
        prepare: called with the rank before the command line runs; can be pickled.
        variables: environment variables beside those of the test process.
        grace: seconds from a rank's failure until the others get SIGTERM.
        draws_curves: whether curves.png is a picture, which takes longer than the steps of a small run.
    """

    arguments: tuple[str, ...]
    processes: int | None
    folder: Path
    logs: Path
    program: str | None = None
    prepare: Callable[[int], None] | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    grace: float = 0.0
    timeout: float = 300.0
    draws_curves: bool = False


@dataclass(frozen=True)
class Ended:
    """How a launch ended.

    Attributes:
        code: of the launcher: 0 if all ranks returned 0; -9 if it was killed with them.
        codes: of the ranks, negative for signals; empty if the launcher was killed.
        session: its id; see `members`.
        timed_out: it was killed for taking longer than `Launch.timeout`.
    """

    code: int
    codes: dict[int, int]
    session: int
    seconds: float
    timed_out: bool

    @property
    def succeeded(self) -> bool:
        return self.code == 0


def run(launch: Launch) -> Ended:
    """Start the ranks and wait for their end."""
    launch.logs.mkdir(parents=True)
    start = time.monotonic()
    # Not daemonic: the ranks may start processes of their own.
    process = forkserver().Process(target=_launcher, args=(launch, free_port()), daemon=False)
    process.start()
    try:
        process.join(launch.timeout)
    except BaseException:
        end_session(process.pid)
        raise
    timed_out = process.exitcode is None
    if timed_out:
        end_session(process.pid)
        process.join()
    return Ended(process.exitcode, _codes(launch), process.pid, time.monotonic() - start, timed_out)


def members(session: int) -> list[int]:
    """Return the processes of a session that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):  # it has ended meanwhile
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def end_session(session: int) -> None:
    for process in members(session):
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            pass


def orphans_of(sessions: Iterable[int], seconds: float = 10.0) -> list[str]:
    """Return what still runs of launches that have ended, after at most `seconds`, and end it."""
    deadline = time.monotonic() + seconds
    sessions = list(sessions)
    while (left := [one for session in sessions for one in members(session)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    found = [_command_of(process) for process in left]
    for session in sessions:
        end_session(session)
    return found


def read_output(launch: Launch, stream: Literal["out", "err"]) -> str:
    """Return what all ranks wrote to stdout or stderr, rank after rank."""
    return "".join(path.read_text(errors="replace") for path in sorted(launch.logs.glob(f"rank*.{stream}")))


def printed(launch: Launch) -> str:
    """Return what all ranks printed, with the name of each file."""
    return "".join(f"[{path.name}]\n{path.read_text(errors='replace')}" for path in sorted(launch.logs.glob("rank*")))


def _command_of(process: int) -> str:
    try:
        return f"{process}: " + Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return str(process)


def _codes(launch: Launch) -> dict[int, int]:
    path = launch.logs / "exit_codes.json"
    return {int(rank): code for rank, code in json.loads(path.read_text()).items()} if path.exists() else {}


def _launcher(launch: Launch, port: int) -> None:
    """Start the ranks and wait for their end."""
    os.setsid()
    gc.freeze()  # a collection in a rank would copy all pages of what was imported before the fork
    ranks: dict[int, int] = {}
    for rank in range(launch.processes or 1):
        process = os.fork()
        if process == 0:
            _be_rank(launch, rank, port)
        ranks[process] = rank
    codes: dict[int, int] = {}
    failed_at = None
    signals = [(launch.grace, signal.SIGTERM), (launch.grace + TERM_SECONDS, signal.SIGKILL)]
    while len(codes) < len(ranks):
        process, status = os.waitpid(-1, os.WNOHANG)
        if process in ranks:
            codes[ranks[process]] = os.waitstatus_to_exitcode(status)
            if codes[ranks[process]] and failed_at is None:
                failed_at = time.monotonic()
        while failed_at is not None and signals and time.monotonic() - failed_at >= signals[0][0]:
            _signal(ranks, codes, signals.pop(0)[1])
        if process == 0:
            time.sleep(_POLL_SECONDS)
    (launch.logs / "exit_codes.json").write_text(json.dumps(codes))
    sys.exit(int(any(codes.values())))


def _signal(ranks: dict[int, int], codes: dict[int, int], number: int) -> None:
    for process, rank in ranks.items():
        if rank not in codes:
            os.kill(process, number)


def _variables(launch: Launch, rank: int, port: int) -> dict[str, str]:
    """Return the environment variables of a rank."""
    names: dict[str, object] = dict(launch.variables)
    if launch.processes is not None:
        names |= {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        names |= {"WORLD_SIZE": launch.processes, "LOCAL_WORLD_SIZE": launch.processes}
    return {name: str(value) for name, value in names.items()}


def _be_rank(launch: Launch, rank: int, port: int) -> None:
    """Run a rank to its end. Does not return."""
    code = 70
    try:
        for descriptor, name in ((1, "out"), (2, "err")):
            opened = os.open(launch.logs / f"rank{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(opened, descriptor)
        faulthandler.dump_traceback_later(max(1.0, launch.timeout - 5), file=sys.__stderr__)
        os.environ.update(_variables(launch, rank, port))
        os.chdir(launch.folder)
        multiprocessing.set_start_method(None, force=True)  # a process of a forkserver would start others by one, too
        sys.argv = ["megatron-gkd", *launch.arguments]
        if not launch.draws_curves:
            _draw_nothing()
        if launch.prepare is not None:
            launch.prepare(rank)
        if launch.program is not None:
            runpy.run_path(launch.program, run_name="__main__")
        else:
            from megatron_gkd import cli

            cli.run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _draw_nothing() -> None:
    from megatron_gkd.reporting import reporter

    def plot_curves(metrics_path: Path, png_path: Path) -> Path:
        png_path.write_bytes(b"")
        return png_path

    reporter.plot_curves = plot_curves
