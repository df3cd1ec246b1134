"""Measure the start-up of `megatron-gkd train`, beside importing the libraries.

    python scripts/benchmarks/startup.py [--repeats 5] [--imports]

Processor seconds (user and system, children included) from the start of a process to the first step of a small recipe,
over those of a process that only imports `LIBRARIES`. With --nproc 1, those of the launcher until it starts the rank
are added. All run in turn; medians and their ratios are printed and written as JSON into --output, after each turn.
Processor seconds depend less on other work of the machine than the clock does. --imports prints what was imported, by
the seconds that each module took itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

if not __package__:  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

if TYPE_CHECKING:
    from benchmarks.report import Section

LIBRARIES = (
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "mcore_bridge",
)
ROOT = Path(__file__).resolve().parents[2]
SECONDS = "sum(os.times()[:4])"
# Megatron-Core is imported by the package's own preparation, which works around what it looks for and is not there.
IMPORT = f"""\
import os, sys, importlib
import megatron_gkd.runtime.preload
for name in {LIBRARIES!r}: importlib.import_module(name)
print({SECONDS}, file=open(sys.argv[1], "w"))
os._exit(0)
"""
TRAIN = f"""\
import os, sys, json, importlib.abc, importlib.machinery
out = sys.argv.pop(1)
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "megatron_gkd.training.trainer": return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            def train_step(*arguments):
                print({SECONDS}, file=open(out, "w"))
                print(*sys.modules, sep="\\n", file=open(out + ".modules", "w"))
                os._exit(0)
            module.Trainer.train_step = train_step
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Finder())
from megatron_gkd.cli import run
run()
"""

LAUNCH = f"""\
import os, sys
from megatron_gkd.launch.ranks import Ranks
out = sys.argv.pop(1)
def start(*arguments):
    print({SECONDS}, file=open(out, "w"))
    os._exit(0)
Ranks.start = start
from megatron_gkd.cli import run
run()
"""


def measure(program: str, arguments: Sequence[str], folder: Path, imports: Path | None = None) -> float:
    """Run a program in a process of its own, and return the processor seconds that it writes.

    Raises:
        RuntimeError: it did not write any.
    """
    out = folder / "seconds.txt"
    out.unlink(missing_ok=True)
    options = ["-X", "importtime"] if imports else []
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *options, "-c", program, str(out), *arguments]
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if not out.exists():
        raise RuntimeError(f"{' '.join(arguments) or 'imports'}: did not come to the end:\n{finished.stderr[-3000:]}")
    if imports is not None:
        imports.write_text(finished.stderr)
    return float(out.read_text())


def workspace(folder: Path) -> list[str]:
    """Write a small recipe, its models and its rows; return the arguments of a run in one process."""
    sys.path.insert(1, str(ROOT / "tests"))
    from command_line import write_workspace

    write_workspace(folder)
    return ["train", "recipe.yaml", "--tensor_model_parallel_size", "1", "--sequence_parallel", "false"]


def slowest(report: Path, count: int) -> list[tuple[float, str]]:
    """Return the modules that took longest by themselves, from a report of -X importtime, in seconds."""
    rows = [line.split("|") for line in report.read_text().splitlines() if line.startswith("import time:")]
    found = [(int(row[0].split(":")[1]) / 1e6, row[2].strip()) for row in rows[1:] if len(row) == 3]
    return sorted(found, reverse=True)[:count]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--imports", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = workspace(folder)
        if options.imports:
            report = folder / "imports.txt"
            measure(TRAIN, arguments, folder, report)
            print(*(f"{seconds:7.3f} s  {module}" for seconds, module in slowest(report, 40)), sep="\n")
            return 0
        samples: dict[str, list[float]] = {"imports": [], "to the first step": [], "launcher": []}
        for _ in range(options.repeats):
            samples["imports"].append(measure(IMPORT, [], folder))
            samples["to the first step"].append(measure(TRAIN, arguments, folder))
            samples["launcher"].append(measure(LAUNCH, [*arguments, "--nproc", "1"], folder))
            save(samples, options.output)
    return 0


def save(samples: dict[str, list[float]], output: Path) -> None:
    """Print the ratio so far, and write it with all samples."""
    import torch

    from benchmarks.environment import describe, file_stem
    from benchmarks.report import headline

    medians = {name: median(of_name) for name, of_name in samples.items()}
    alone, imports = medians["to the first step"], medians["imports"]
    ratios = {"one process": alone / imports, "--nproc 1": (alone + medians["launcher"]) / imports}
    print(*(f"{name}: {seconds:.2f} s" for name, seconds in medians.items()), sep=", ", end="; ")
    print("over the imports:", *(f"{name}: {ratio:.2f}" for name, ratio in ratios.items()))
    environment = describe(torch.device("cpu"))
    output.mkdir(parents=True, exist_ok=True)
    run = {"environment": environment, "processor_seconds": samples, "ratios": ratios, "goal": 1.5}
    path = output / f"{file_stem('startup', environment)}.json"
    path.write_text(json.dumps(run, indent=1) + "\n")
    path.with_suffix(".md").write_text(f"## {headline(run)}\n\n{section(run).markdown()}")


def section(run: dict) -> Section:
    """Return the table of a run."""
    from benchmarks.report import Section

    seconds = {name: f"{median(samples):.2f}" for name, samples in run["processor_seconds"].items()}
    ratios = {f"{name} × imports": f"{ratio:.2f}" for name, ratio in run["ratios"].items()}
    titles = [f"{name}, s" for name in seconds] + list(ratios)
    goal = [""] * len(seconds) + [f"≤ {run['goal']}"] * len(ratios)
    rows = [("measured", *seconds.values(), *ratios.values()), ("goal", *goal)]
    return Section("Start-up, processor seconds", ("", *titles), rows)


if __name__ == "__main__":
    sys.exit(main())
