"""A run that is killed again and again, and continued each time by the same command, beside one that is not."""

from __future__ import annotations

import contextlib
import json
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forked_launch
import yaml
from faults.configurations import CONFIGURATIONS, teacher_model, write_rows
from faults.injection import Injection
from faults.outcome import differences
from faults.points import Kill, draw
from faults.student_server import StudentServer
from forked_launch import Ended, Launch

from megatron_gkd.training.checkpointing.folder import CheckpointFolder

_TAIL = 3000
"""Characters of the ranks' output in a report."""


@dataclass
class KillResult:
    """What became of one planned kill.

    Attributes:
        happened: False where the run ended before the point.
        resumed_from: the step of the newest checkpoint when the launch began; 0 for none.
        where: what the rank wrote of itself before it was killed.
    """

    kill: Kill
    happened: bool
    resumed_from: int
    where: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class RunResult:
    """What became of one run.

    Attributes:
        problems: how its end differs from that of the uninterrupted run, or what failed on the way.
    """

    configuration: str
    number: int
    folder: Path
    kills: list[KillResult] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def num_kills(self) -> int:
        return sum(kill.happened for kill in self.kills)


class FaultRuns:
    """Runs of one configuration. The uninterrupted one is made at once.

    Args:
        folder: for the runs, with their data.
        report: takes a line about each kill.
        timeout: seconds that one launch may take.

    Raises:
        RuntimeError: a launch that nobody killed failed.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        steps: int,
        report: Callable[[KillResult], None] = lambda result: None,
        timeout: float = 300.0,
    ):
        self.name, self.folder, self.steps, self.report, self.timeout = name, folder, steps, report, timeout
        self.configuration = CONFIGURATIONS[name]
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder)
        recipe = self.configuration.recipe(steps)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        if "teacher_cache" in recipe["teacher"]:
            self._score(recipe)
        with self._server() as options:
            whole = self._launch("whole", options, self._injection(None, 0, "whole", 1), 1)
            ended = forked_launch.run(whole)
        _require_success(whole, ended)
        self._training = sum(json.loads(line).get("step_time_s", 0) for line in _lines(folder / "whole/metrics.jsonl"))
        self._startup = ended.seconds - self._training

    def draw_and_run(self, number: int, count: int, seed: int) -> RunResult:
        """Make the run of this number, with `count` kills that follow from `seed`."""
        generator = random.Random(f"{seed}/{self.name}/{number}")
        made = self.configuration
        return self.run(number, draw(generator, count, steps=self.steps, processes=made.processes, has=made.has))

    def run(self, number: int, kills: Sequence[Kill]) -> RunResult:
        """Make a run with these kills, one after another, and compare its end with the uninterrupted run's.

        A kill in a resume waits until there is a checkpoint to resume from.
        """
        output = f"run-{number}"
        result = RunResult(self.name, number, self.folder / output)
        sessions: list[int] = []
        try:
            with self._server() as options:
                self._kill_all(output, options, kills, result, sessions)
        except RuntimeError as error:
            result.problems.append(str(error))
        orphans = forked_launch.orphans_of(sessions)
        if orphans:
            result.problems.append(f"processes that outlived their launch: {orphans}")
        if not result.problems:
            result.problems = differences(result.folder, self.folder / "whole")
        return result

    def _kill_all(
        self, output: str, options: tuple[str, ...], kills: Sequence[Kill], result: RunResult, sessions: list[int]
    ) -> None:
        left = list(kills)
        while True:
            steps = CheckpointFolder(result.folder / "checkpoints").steps()
            newest = steps[-1] if steps else 0
            kill = next((kill for kill in left if steps or kill.point.phase != "resume"), None)
            number = len(result.kills) + 1
            injection = self._injection(kill, newest, output, number)
            made = self._launch(output, options, injection, number)
            ended = forked_launch.run(made)
            sessions.append(ended.session)
            if kill is None:
                return _require_success(made, ended)
            left.remove(kill)
            result.kills.append(KillResult(kill, not ended.succeeded, newest, seconds=ended.seconds))
            if ended.succeeded:
                return
            result.kills[-1].where = _where(made, injection, ended)
            self.report(result.kills[-1])

    def _injection(self, kill: Kill | None, newest: int, output: str, number: int) -> Injection:
        bad_steps = self.configuration.bad_steps
        if kill is None:
            return Injection(bad_steps=bad_steps)
        to_go = max(0, kill.target - newest) / self.steps
        marker = self.folder / f"{output}-killed-{number}.json"
        return Injection(kill, marker, self._startup + to_go * self._training, bad_steps)

    def _launch(self, output: str, options: tuple[str, ...], injection: Injection, number: int) -> Launch:
        return Launch(
            ("train", "recipe.yaml", "--output_dir", output, *options),
            self.configuration.processes,
            self.folder,
            self.folder / f"{output}-logs-{number}",
            prepare=injection.install,
            timeout=self.timeout,
        )

    @contextlib.contextmanager
    def _server(self) -> Iterator[tuple[str, ...]]:
        """Give the options of the command line that name the student's server, while it runs; none without one."""
        if "servers" not in self.configuration.has:
            yield ()
            return
        with StudentServer() as server:
            yield ("--vllm_server_urls", server.url)

    def _score(self, recipe: dict[str, dict[str, Any]]) -> None:
        """Make the teacher's cache."""
        own = {"teacher": {"teacher_model": teacher_model()}}
        (self.folder / "score.yaml").write_text(yaml.safe_dump(recipe | own))
        arguments = ("score", "score.yaml", "--output", recipe["teacher"]["teacher_cache"], "--output_dir", "unused")
        score = Launch(arguments, self.configuration.processes, self.folder, self.folder / "score-logs")
        _require_success(score, forked_launch.run(score))


def _where(planned: Launch, injection: Injection, ended: Ended) -> dict[str, Any]:
    """Return what the killed rank wrote. RuntimeError if the launch ended in any other way than by that kill."""
    kill, marker = injection.kill, injection.marker
    was_killed = -signal.SIGKILL in (ended.code, ended.codes.get(kill.rank))
    if ended.timed_out or not was_killed or not marker.exists():
        raise RuntimeError(_failure(planned, ended, f"before its kill ({kill.describe()})"))
    return json.loads(marker.read_text())


def _require_success(made: Launch, ended: Ended) -> None:
    if not ended.succeeded:
        raise RuntimeError(_failure(made, ended, "without a kill"))


def _failure(made: Launch, ended: Ended, when: str) -> str:
    what = f"took longer than {made.timeout:g} s" if ended.timed_out else f"ended with {ended.codes or ended.code}"
    return f"{' '.join(made.arguments)}: {what}, {when}:\n{forked_launch.printed(made)[-_TAIL:]}"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()
