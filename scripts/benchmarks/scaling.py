"""Strong and weak scaling of a training step over 1, 2 and 4 processes, and the collectives of a step.

    python scripts/benchmarks/scaling.py                                        # 3 minutes on 2 quiet cores
    python scripts/benchmarks/scaling.py --output scripts/benchmarks/results    # what docs/performance.md shows
    python scripts/benchmarks/scaling.py --plan --output scripts/benchmarks/results    # the planner's, to 1024 GPUs

All layouts are measured in turn, several times, so that their ratios hold on a machine that others use as well. Strong
scaling keeps the rows of a step, weak scaling the rows of a step and process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks import collective_counts
from benchmarks.collective_counts import CASES, MICROBATCHES, Models
from benchmarks.collectives import CollectiveCounter, groups_of
from benchmarks.environment import describe, file_stem, version
from benchmarks.random_runs import RandomRun, save_model
from benchmarks.report import Section, headline
from megatron_gkd.runtime.mesh import destroy_mesh

SIZES = dict(hidden_size=256, intermediate_size=768, num_attention_heads=8, head_dim=32, vocab_size=8192)
LAYERS, LENGTH = 4, 128
STRONG_ROWS, WEAK_ROWS = 8, 2


@dataclass(frozen=True)
class Layout:
    """A layout and its number of processes; data parallelism takes what the other dimensions leave.

    Attributes:
        processes: their number.
        parallel: the section of the recipe.
        has_experts: whether the student is a mixture of experts.
    """

    processes: int
    parallel: dict[str, Any]
    has_experts: bool = False

    @property
    def data_parallel(self) -> int:
        """Number of replicas that have rows of their own."""
        sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        for name in sizes:
            if name in self.parallel:
                return self.processes // self.parallel[name]
        return self.processes


def _tensor(size: int) -> dict[str, Any]:
    return {"tensor_model_parallel_size": size, "sequence_parallel": True}


LAYOUTS = {
    "one process": Layout(1, {}),
    "DP2": Layout(2, {}),
    "TP2+SP": Layout(2, _tensor(2)),
    "PP2": Layout(2, {"pipeline_model_parallel_size": 2}),
    "CP2": Layout(2, {"context_parallel_size": 2}),
    "DP4": Layout(4, {}),
    "TP4+SP": Layout(4, _tensor(4)),
    "TP2+SPxDP2": Layout(4, _tensor(2)),
    "PP2xDP2": Layout(4, {"pipeline_model_parallel_size": 2}),
    "CP2xDP2": Layout(4, {"context_parallel_size": 2}),
    "experts, one process": Layout(1, {}, has_experts=True),
    "experts, EP2": Layout(2, {"expert_model_parallel_size": 2}, has_experts=True),
    "experts, EP4": Layout(4, {"expert_model_parallel_size": 4}, has_experts=True),
}


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        rounds: how often all layouts are measured in turn.
        steps: measured steps of each round.
        layouts: names in `LAYOUTS`.
        cases: names in `CASES`, whose collectives are counted.
    """

    rounds: int = 3
    steps: int = 3
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    cases: tuple[str, ...] = tuple(CASES)


@dataclass(frozen=True)
class Folders:
    """The models' files."""

    root: Path

    @classmethod
    def make(cls, root: Path) -> Folders:
        """Write the models."""
        save_model(root / "student", LAYERS, **SIZES)
        save_model(root / "experts", LAYERS, experts=8, **SIZES)
        save_model(root / "teacher", LAYERS, **SIZES)
        Models.save(root)
        return cls(root)


def measure(options: Options) -> dict[str, Any]:
    """Return what `write` needs beside the environment."""
    timings: dict[str, dict[str, list[float]]] = {name: {"strong": [], "weak": []} for name in options.layouts}
    traffic: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="scaling_benchmark_") as temporary:
        folders = Folders.make(Path(temporary))
        for _ in range(options.rounds):
            for name in options.layouts:
                layout = LAYOUTS[name]
                strong, weak, traffic[name] = in_world(layout.processes, time_layout, layout, folders, options.steps)
                timings[name]["strong"] += strong
                timings[name]["weak"] += weak
        counts = {name: in_world(2, _count, name, folders) for name in options.cases}
    return {"seconds": timings, "bytes": traffic, "collectives": counts}


def in_world(processes: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `work`, a function of a module, returns on rank 0 of a gloo world of new processes.

    gloo keeps two polling threads for each group that a process ever had: many worlds in the same processes would slow
    each other down.
    """
    with tempfile.TemporaryDirectory(prefix="scaling_world_") as folder:
        torch.multiprocessing.start_processes(
            _join, (processes, Path(folder), work, arguments), processes, start_method="forkserver"
        )
        return json.loads((Path(folder) / "result.json").read_text())


def _join(rank: int, processes: int, folder: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=processes)
    result = work(*arguments)
    dist.destroy_process_group()
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))


def time_layout(layout: Layout, folders: Folders, steps: int) -> tuple[list[float], list[float], int]:
    """Return seconds of steps with strong and with weak scaling, and the bytes that rank 0 sends in a strong step."""
    student = folders.root / ("experts" if layout.has_experts else "student")
    run = RandomRun.build({"parallel": layout.parallel}, student, folders.root / "teacher")
    trainer = run.trainer(folders.root)
    number = 0

    def seconds(rows: int) -> float:
        nonlocal number
        number += 1
        microbatches = run.microbatches(rows // layout.data_parallel, LENGTH)
        dist.barrier()
        start = time.perf_counter()
        trainer.train_step(number, microbatches)
        dist.barrier()
        return time.perf_counter() - start

    seconds(WEAK_ROWS * layout.processes)
    found = [[seconds(rows) for _ in range(steps)] for rows in (STRONG_ROWS, WEAK_ROWS * layout.processes)]
    with CollectiveCounter(groups_of(run.mesh)) as counter:
        seconds(STRONG_ROWS)
    destroy_mesh()
    moved = sum(size for (_, operation), size in counter.num_bytes.items() if operation != "recv")
    return found[0], found[1], moved


def _count(name: str, folders: Folders) -> dict[int, list[list[Any]]]:
    """Return the operations of a step by number of microbatches: group, operation, count."""
    models = Models(*(folders.root / one for one in ("dense", "mixture", "teacher")))
    found = collective_counts.count(CASES[name], models, folders.root)
    ranks: list[Any] = [None] * 2
    dist.all_gather_object(ranks, found)
    combined = {m: collective_counts.combine([rank[m] for rank in ranks]) for m in MICROBATCHES}
    return {m: [[*key, count] for key, count in counts.items()] for m, counts in combined.items()}


def sections(run: dict[str, Any]) -> Iterator[Section]:
    """Return the tables of the results."""
    cores = run["environment"]["cpu_count"]
    columns = ("layout", "processes", "strong: s a step", "strong: × one process", "strong: of ideal")
    columns += ("weak: s a step", "weak: of ideal", "MB a rank and step")
    yield Section("Scaling", columns, [_row(run, name, cores) for name in run["seconds"]])
    rows = [
        [name, *key, CASES[name].formulas[key], *(str(_counted(run, name, key, m)) for m in MICROBATCHES)]
        for name in run["collectives"]
        for key in CASES[name].formulas
    ]
    columns = ("layout of 2", "group", "operation", "formula", *(f"counted, m = {m}" for m in MICROBATCHES))
    yield Section("Collectives of a step", columns, rows)


def _row(run: dict[str, Any], name: str, cores: int) -> list[str]:
    layout, found = LAYOUTS[name], run["seconds"][name]
    base = run["seconds"]["experts, one process" if layout.has_experts else "one process"]
    strong, weak = (median(found[kind]) for kind in ("strong", "weak"))
    speedup, most = median(base["strong"]) / strong, min(layout.processes, cores)
    # Rows and processes grow together; on fewer cores than processes the ideal time grows with them.
    ideal = median(base["weak"]) * layout.processes / most
    return [
        name,
        str(layout.processes),
        f"{strong:.3g}",
        f"{speedup:.2f}",
        f"{speedup / most:.0%}",
        f"{weak:.3g}",
        f"{ideal / weak:.0%}",
        f"{run['bytes'][name] / 1e6:.3g}",
    ]


def _counted(run: dict[str, Any], name: str, key: tuple[str, str], microbatches: int) -> int:
    found = run["collectives"][name][str(microbatches)]
    return next((count for *other, count in found if tuple(other) == key), 0)


def write(run: dict[str, Any], output: Path) -> str:
    """Write the figures as JSON and Markdown. Returns the latter."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{file_stem('scaling', run['environment'])}.json"
    path.write_text(json.dumps(run, indent=1) + "\n")
    environment = run["environment"]
    load = f"load of {environment['load_average']:.0f} before on {environment['cpu_count']} cores"
    text = "\n".join([f"## {headline(run)}, fp32, {load}", "", *(section.markdown() for section in sections(run))])
    path.with_suffix(".md").write_text(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=Options.rounds, help="how often the layouts are measured in turn")
    parser.add_argument("--steps", type=int, default=Options.steps, help="steps of a layout in a round")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--plan", action="store_true", help="write the planner's estimate to 1024 GPUs, and no more")
    arguments = parser.parse_args()
    if arguments.plan:
        planner = Path(__file__).with_name("planned_scaling.py")  # in a process that has no device yet
        sys.exit(subprocess.run([sys.executable, planner, arguments.output.absolute()]).returncode)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    multiprocessing.set_forkserver_preload(["megatron_gkd.runtime.preload", "megatron_gkd.training.run"])
    environment = describe(torch.device("cpu"))  # with the load that others make
    environment |= {"megatron-core": version("megatron-core")}
    print(write({"environment": environment, **measure(Options(arguments.rounds, arguments.steps))}, arguments.output))


if __name__ == "__main__":
    main()
