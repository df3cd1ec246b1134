"""The engines generate the same request in turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers import Unavailable
from benchmarks.rollouts.cases import Case
from benchmarks.rollouts.engines import ENGINES, OURS, Engine, Request
from benchmarks.timing import Plan, in_turn


class Engines:
    """The engines of one model, each opened once.

    Args:
        names: of `ENGINES`.
        model: the folder of the model.

    Attributes:
        missing: by name, why an engine is not there, and the command that installs it.
    """

    def __init__(self, names: Sequence[str], model: Path) -> None:
        self.missing: dict[str, tuple[str, str]] = {}
        self._engines: dict[str, Engine] = {}
        for name in names:
            try:
                self._engines[name] = ENGINES[name](model)
            except Unavailable as unavailable:
                self.missing[name] = (unavailable.reason, unavailable.install)

    def measure(self, case: Case, plan: Plan) -> dict[str, Any]:
        """Return a case's record: seconds, tokens and equal completions of each engine."""
        request = Request(case, case.prompts())
        expected = self._engines[OURS].generate(request)
        stops = case.stop_tokens(expected)
        if stops:
            request = replace(request, stop_token_ids=stops)
            expected = self._engines[OURS].generate(request)
        record: dict[str, Any] = {
            "case": case.name,
            "vocab_size": case.vocab_size,
            "prompts": case.num_prompts,
            "is_greedy": case.is_greedy,
            "prompt_tokens": sum(map(len, request.prompts)),
            "longest_completion": max(map(len, expected)),
            "contestants": {},
        }
        runs = {}
        for name, engine in self._engines.items():
            found = expected if name == OURS else engine.generate(request)  # warm-up
            record["contestants"][name] = {
                "status": "ok",
                "install": "",
                "tokens": sum(map(len, found)),
                "equal_completions": sum(a == b for a, b in zip(found, expected, strict=True)),
            }
            runs[name] = partial(_seconds, engine, request)
        for name, seconds in in_turn(runs, plan).items():
            record["contestants"][name]["total_s"] = seconds
        for name, (reason, install) in self.missing.items():
            record["contestants"][name] = {"status": reason, "install": install, "total_s": []}
        return record

    def close(self) -> None:
        """Close the engines."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()


def _seconds(engine: Engine, request: Request) -> float:
    gc.collect()
    start = time.perf_counter()
    engine.generate(request)
    return time.perf_counter() - start
