"""Jobs on the Slurm cluster that scripts/test_slurm.sh starts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from launching import ROOT, environment, wait_for

SCRIPTS = ROOT / "scripts/slurm"
CREDENTIAL_EXPIRES_S = 7.0
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@dataclass(frozen=True)
class Job:
    """A submitted job.

    Attributes:
        number: its id in Slurm.
        folder: where it was submitted.
    """

    number: int
    folder: Path

    @property
    def log(self) -> str:
        file = self.folder / f"gkd-{self.number}.out"
        return file.read_text() if file.exists() else ""

    @property
    def state(self) -> str:
        return self._field("JobState")

    @property
    def restarts(self) -> int:
        return int(self._field("Restarts"))

    @property
    def exit_code(self) -> int:
        return int(self._field("ExitCode").partition(":")[0])

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Wait for a condition; fail, with the log, where it takes too long or the job ends."""

        def is_met() -> bool:
            return condition() or self.state in _ENDED

        try:
            wait_for(is_met, seconds)
            assert condition(), f"the job is {self.state}"
        except AssertionError as error:
            error.add_note(f"{self.log}\n{''.join(map(Path.read_text, self.folder.rglob('node_*.log')))}")
            raise

    def start_again(self, restarts: int) -> None:
        """Wait until the job has been requeued and runs again."""
        self.wait_until(lambda: self.restarts == restarts and self.state in ("PENDING", "RUNNING"), 60)
        self._update("TimeLimit=30")
        time.sleep(CREDENTIAL_EXPIRES_S)  # nodes refuse a job that starts again before
        self._update("StartTime=now", check=False)  # it fails where the job runs already
        self.wait_until(lambda: self.state == "RUNNING", 60)

    def _update(self, change: str, *, check: bool = True) -> None:
        command = ["scontrol", "update", f"jobid={self.number}", change]
        subprocess.run(command, capture_output=True, check=check, timeout=60)

    def wait_for_end(self, seconds: float) -> None:
        self.wait_until(lambda: self.state in _ENDED, seconds)

    def processes(self) -> list[psutil.Process]:
        """Return the processes of the job's steps that still run."""
        found = []
        for process in psutil.process_iter(["cwd"]):
            if process.info["cwd"] == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def _field(self, name: str) -> str:
        text = run("scontrol", "show", "job", str(self.number))
        return re.search(rf"\b{name}=(\S+)", text)[1]


def submit(folder: Path, *arguments: str, **variables: str) -> Job:
    """Submit a job: `arguments` of sbatch, the script and its own arguments; `variables` of its environment."""
    values = {"RECIPE": "recipe.yaml", "PYTHON": sys.executable, "NPROC": "1", **variables}
    cluster = {name: value for name, value in os.environ.items() if name.startswith("SLURM_CONF")}
    text = run("sbatch", "--parsable", *arguments, cwd=folder, env=environment() | values | cluster)
    return Job(int(text), folder)


def run(*command: str, **how: object) -> str:
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **how)
    assert finished.returncode == 0, f"{' '.join(command)}: {finished.stderr}"
    return finished.stdout
