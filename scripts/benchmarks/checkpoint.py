"""Saving, verifying and loading a training checkpoint of a random model, under tensor parallelism of all processes.

    torchrun --nproc-per-node 2 scripts/benchmarks/checkpoint.py                # about 500 M parameters, bf16
    torchrun --nproc-per-node 2 scripts/benchmarks/checkpoint.py --layers 10    # about 220 M

The stall of an asynchronous save is what training waits for: the snapshot in host memory. On CPUs the writers share the
cores with training, so that steps meanwhile are slower; on GPUs they don't. On a CPU the optimizer's state is in memory
three times at the peak of a save: its own, Megatron's gathered one and the snapshot. Files are read back from the page
cache.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

if not __package__:  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch.distributed as dist
from transformers import Qwen3Config

import megatron_gkd.runtime.preload  # noqa: F401  (before any import of Megatron-Core)
from benchmarks.environment import describe, file_stem, version
from benchmarks.random_models import build_random_model, random_microbatch
from benchmarks.report import Section, headline
from megatron_gkd.config.schema import Recipe
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.training.checkpointing.folder import CheckpointFolder
from megatron_gkd.training.checkpointing.loader import load, verify
from megatron_gkd.training.checkpointing.saver import Saver
from megatron_gkd.training.checkpointing.state import Saved
from megatron_gkd.training.checkpointing.workarounds import apply_workarounds
from megatron_gkd.training.loss import Objective
from megatron_gkd.training.setup import world_of
from megatron_gkd.training.student import Student

SIZES = dict(hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8, head_dim=128)
VOCABULARY, TOKENS, STEPS = 65536, 64, 3


def main() -> None:
    options = parse()
    recipe = recipe_of(dist_size())
    environment = describe(portability.device())  # with the load that others make
    with world_of(recipe) as mesh:
        sizes = SIZES | {"num_hidden_layers": options.layers, "vocab_size": VOCABULARY}
        found = measure(mesh, recipe, sizes, options.folder)
        if mesh.is_main:
            environment |= {"processes": dist.get_world_size(), "megatron-core": version("megatron-core")}
            print(write({"environment": environment, "checkpoint": found}, options.output))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28, help="of 15.7 M parameters each")
    parser.add_argument("--folder", type=Path, default=None, help="on the file system to measure; default: temporary")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    return parser.parse_args()


def dist_size() -> int:
    """Return the number of processes, before they know each other."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def recipe_of(processes: int) -> Recipe:
    return Recipe.model_validate(
        {
            "student": {"model": "random"},
            "teacher": {"teacher_kind": "none"},
            "distill": {},
            "parallel": {"tensor_model_parallel_size": processes},
            "data": {"dataset": ["none"]},
            "train": {"global_batch_size": 1, "train_iters": 100, "lr": 1e-5, "dtype": "bf16"},
            "output": {"output_dir": "none"},
        }
    )


def measure(mesh: Mesh, recipe: Recipe, sizes: dict, folder: Path | None) -> dict:
    """Return the figures of one model. All ranks must call it."""
    apply_workarounds()
    student, microbatch = build_student(mesh, recipe, sizes), random_microbatch(sizes["vocab_size"], TOKENS, seed=0)
    saved = Saved(student)

    def step() -> None:
        student.compute_gradients([microbatch], [None])
        student.update()

    with common_folder(folder) as place:
        step()
        steps = [seconds(step) for _ in range(STEPS)]
        before = portability.peak_memory_bytes()
        run = saved.description() | {"identity": {}, "progress": {"step": 1, "updates": 1}}
        saver = Saver(CheckpointFolder(place), is_asynchronous=False)
        saves = [seconds(lambda number=number: _save(saver, number, saved, run)) for number in (1, 2)]
        saver = Saver(CheckpointFolder(place), is_asynchronous=True)
        start = time.perf_counter()
        stall = seconds(lambda: _save(saver, 3, saved, run))
        meanwhile = []
        while saver.is_busy:
            meanwhile.append(seconds(step))
            saver.poll()
        whole = time.perf_counter() - start
        path = CheckpointFolder(place).final(3)
        figures = {
            "parameters": _parameters(student),
            "bytes": sum(file.stat().st_size for file in path.iterdir()),
            "step_s": median(steps),
            "first_save_s": saves[0],
            "second_save_s": saves[1],
            "async_stall_s": stall,
            "async_whole_s": whole,
            "step_meanwhile_s": median(meanwhile) if meanwhile else None,
            "steps_meanwhile": len(meanwhile),
            "verify_s": seconds(lambda: verify(path)),
            "load_s": seconds(lambda: load(saved, path, 3)),
            "peak_bytes_before": before,
            "peak_bytes": portability.peak_memory_bytes(),
        }
        dist.barrier()
    return figures


def build_student(mesh: Mesh, recipe: Recipe, sizes: dict) -> Student:
    """Build a random student, without a checkpoint on disk."""
    config = Qwen3Config(**sizes, tie_word_embeddings=True, max_position_embeddings=4096)
    model = build_random_model(mesh, config)
    objective = Objective(mesh, sizes["vocab_size"], upstream=1.0)
    return Student(model, objective, recipe.parallel, recipe.train, train_iters=100)


@contextlib.contextmanager
def common_folder(parent: Path | None) -> Iterator[Path]:
    """Make a folder that all ranks know, and delete it afterwards."""
    name = [tempfile.mkdtemp(prefix="checkpoint_benchmark_", dir=parent) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(name)
    try:
        yield Path(name[0])
    finally:
        shutil.rmtree(name[0], ignore_errors=True)


def seconds(work: Callable[[], object]) -> float:
    """Return how long the ranks take together: from the last one's start to the last one's end."""
    dist.barrier()
    start = time.perf_counter()
    work()
    portability.synchronize()
    dist.barrier()
    return time.perf_counter() - start


def _save(saver: Saver, step: int, saved: Saved, run: dict) -> None:
    if not saver.save(step, saved.to_write(), run):
        raise RuntimeError("the checkpoint could not be saved")


def _parameters(student: Student) -> int:
    return sum(tensor.numel() for _, tensor in student.model.named_tensors())


def section(run: dict) -> Section:
    """Return the figures as a table of one row."""
    found = run["checkpoint"]
    columns = ("parameters", "size", "first save", "second", "step", "stall of an asynchronous save")
    columns += ("until it is whole", "step meanwhile", "SHA-256", "load", "peak memory, before")
    meanwhile = found["step_meanwhile_s"]
    row = (
        f"{found['parameters'] / 1e6:.0f} M",
        f"{found['bytes'] / 1e9:.2f} GB",
        f"{found['first_save_s']:.1f} s",
        f"{found['second_save_s']:.1f} s",
        f"{found['step_s']:.2f} s",
        f"{found['async_stall_s']:.2f} s ({found['async_stall_s'] / found['step_s']:.1f} steps)",
        f"{found['async_whole_s']:.1f} s",
        "" if meanwhile is None else f"{meanwhile:.2f} s",
        f"{found['verify_s']:.1f} s",
        f"{found['load_s']:.1f} s",
        f"{found['peak_bytes'] / 1e9:.1f} GB, {found['peak_bytes_before'] / 1e9:.1f} GB a process",
    )
    environment = run["environment"]
    load = f"load of {environment['load_average']:.0f} before on {environment['cpu_count']} cores"
    return Section(f"Checkpoint, bf16, TP{environment['processes']}, {load}", columns, [row])


def write(run: dict, output: Path) -> str:
    """Write the figures as JSON and Markdown. Returns the latter."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{file_stem('checkpoint', run['environment'])}.json"
    path.write_text(json.dumps(run, indent=1) + "\n")
    text = f"## {headline(run)}, {run['environment']['processes']} processes\n\n{section(run).markdown()}"
    path.with_suffix(".md").write_text(text)
    return text


if __name__ == "__main__":
    main()
