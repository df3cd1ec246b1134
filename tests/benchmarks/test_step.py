"""The benchmark of whole steps: its floor, its processes, its tables, and comparisons of results."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks import compare
from benchmarks.environment import describe
from benchmarks.peers import Unavailable
from benchmarks.steps import report
from benchmarks.steps.cases import CASES, SPARSE_STUDENT, Case, Sizes, groups
from benchmarks.steps.contestants import COMPILED, DP2, ENTRIES, FLOOR, OURS, TEAMS, TRL
from benchmarks.steps.measure import Benchmark
from benchmarks.timing import Plan
from torch.utils._python_dispatch import TorchDispatchMode

SIZES = Sizes(64, 2, 96)
TINY = Case("tiny", 256, (24, 16, 32), microbatch_rows=3, student=SIZES, teacher=Sizes(128, 2, 192))


class Multiplications(TorchDispatchMode):
    """Counts those of matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            a, b = args[-2:]
            self.count += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def count_both(rank, world_size, folder):
    """Return the multiplications of the floor and of a real step, for each kind of student."""
    from benchmarks.steps import floor, ours

    class OneTurn:
        clock = ours.PhaseClock()
        left = 1

        def begin(self):
            self.left -= 1
            return self.left == 0

        def end(self, loss):
            pass

    found = []
    for index, case in enumerate(
        (TINY, replace(TINY, has_lora=True), replace(TINY, student=replace(SIZES, experts=4), microbatch_rows=1))
    ):
        models = Path(folder) / str(index)
        case.save_models(models)
        with Multiplications() as least:
            floor.Contestant(0, 1, models).run(case, models, OneTurn())
        run = ours.build(case, models, {})
        trainer, microbatches = run.trainer(models), ours.microbatches_of(case, 0, 1)
        with Multiplications() as real:
            trainer.train_step(1, microbatches)
        ours.destroy_mesh()
        found.append((least.count, real.count))
    return found


def test_the_floor_has_the_products_of_a_step(gloo_world, tmp_path):
    for least, real in gloo_world(1).run(count_both, str(tmp_path))[0]:
        assert least == real > 0


def test_contestants_do_their_steps_in_turn_in_processes_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setitem(TEAMS, COMPILED, replace(TEAMS[FLOOR], module="no_such_module"))
    benchmark = Benchmark([FLOOR, COMPILED], Plan(repeats=2, least=2, seconds=0), tmp_path)
    try:
        record = benchmark.measure(TINY)
    finally:
        benchmark.close()
    found = record["contestants"]
    assert len(found[FLOOR]["seconds"]) == 2 and min(found[FLOOR]["seconds"]) > 0
    assert set(found[FLOOR]["phases"]) == {"teacher", "student", "head and loss"}
    assert "no_such_module" in found[COMPILED]["status"]
    assert record["tokens"] == 72 and record["labels"] == 54


def test_rows_fit_two_processes():
    for case in CASES.values():
        assert len(case.lengths) % (2 * case.microbatch_rows) == 0 or case.microbatch_rows == len(case.lengths) // 2
        assert len(groups(case.rows(), case.microbatch_rows)) >= 2, "two stages need two microbatches"
        assert min(len(row) for row in case.rows()) > 4
    assert SPARSE_STUDENT.config(32).num_experts == 8


def results(ours=2.0, **others):
    seconds = {OURS: ours, TRL: 20.0, FLOOR: 1.0, DP2: 1.0} | others
    phases = {"teacher": [0.2], "student": [0.4]}
    contestants = {
        name: {"status": "ok", "install": "", "seconds": [value] * 3, "peak_bytes": [10**9], "phases": phases}
        for name, value in seconds.items()
    }
    contestants[COMPILED] = {"status": "not installed", "install": "pip install it"}
    case = {"case": "a step", "vocab": 151936, "tokens": 100, "labels": 75, "lora": False}
    losses = {OURS: [1.0, 0.5], TRL: [1.0, 0.50001]}
    environment = describe(torch.device("cpu")) | {"clock": "wall"}
    return {"environment": environment, "steps": [case | {"losses": losses, "contestants": contestants}]}


def test_the_tables_have_the_distance_to_each_goal(tmp_path):
    run = results()
    report.write(run, tmp_path)
    written = {path.suffix: path for path in tmp_path.iterdir()}
    text = written[".md"].read_text()
    assert (
        "| step | tokens/s | TRL × ours | ours × floor | DP2 | torch.compile × ours | TRL × floor | 2 threads |" in text
    )
    assert (
        "| a step | 50 | 10.0 (≥ 10: reached) | 2.00 (≤ 1.25: missed by 60%) | 2.00 (≥ 1.7: reached) |  | 20.0 |  |"
        in text
    )
    assert all(len(section.columns) == len(row) for section in report.summaries(run) for row in section.rows)
    assert "| TRL GKDTrainer | 20 | 5 | 10.0 | 20.0 | 1.00 GB | 1% | 2% | 0% | 0% | 97% | 2e-05 |" in text
    assert "torch.compile (not installed: pip install it)" in text
    assert "| our time over the floor | a step | ≤ 1.25 | 2.00 | missed by 60% |" in text
    assert json.loads(written[".json"].read_text()) == run
    assert not report.disagreements(run)
    run["steps"][0]["losses"][TRL][1] = 0.5002
    run["steps"][0]["contestants"][DP2]["status"] = "failed"
    wrong = report.disagreements(run)
    assert wrong == ["a step, TRL GKDTrainer: losses differ from ours by 4.0e-04", f"a step, {DP2}: failed"]
    assert written[".json"].name.endswith(f"{run['environment']['release']}.json")


def test_results_are_compared():
    table = compare.section(results(), results(ours=1.0), everything=False)
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows[f"a step · contestants · {OURS} · seconds"] == ["2", "1", "0.500"]
    assert rows[f"a step · contestants · {TRL} · seconds"] == ["20", "20", "1.000"]
    assert not any("peak" in name for name in rows)


@pytest.mark.parametrize("change", [{"device": "another"}, {"threads": 7}, {"clock": "cpu"}])
def test_results_of_different_devices_are_refused(change):
    other = results()
    other["environment"] |= change
    (key,) = change
    assert compare.refusal(results(), other).startswith(f"environment.{key} = ")
    assert compare.refusal(results(), results()) is None
    assert "different benchmarks" in compare.refusal(results(), {"environment": {}, "seconds": {}})


def test_a_missing_peer_names_the_command_that_installs_it(tmp_path, monkeypatch):
    from benchmarks.steps import trl

    monkeypatch.setitem(sys.modules, "trl.experimental.gkd", None)
    with pytest.raises(Unavailable) as caught:
        trl.Contestant(0, 1, tmp_path).run(TINY, tmp_path, None)
    assert "pip install --no-deps" in caught.value.install
    assert set(TEAMS) <= {entry.team for entry in ENTRIES.values()}
