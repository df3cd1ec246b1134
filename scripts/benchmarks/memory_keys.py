"""What the keys about memory free and cost, with random models: bytes of a parameter, and times over those without.

    python scripts/benchmarks/memory_keys.py
    torchrun --nproc-per-node 2 scripts/benchmarks/memory_keys.py

Bytes are those of tensors, and the same on every device. On a CPU "host" memory is the same memory: the times include
the copies, but nothing of a GPU's bus.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

if not __package__:  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch.distributed as dist
from torch import Tensor
from transformers import Qwen3Config

import megatron_gkd.runtime.preload  # noqa: F401  (before any import of Megatron-Core)
from benchmarks.random_models import build_random_model, random_microbatch
from megatron_gkd.config.schema import Recipe
from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.models.megatron_model import MegatronModel
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.teachers.base import ReadOnce
from megatron_gkd.teachers.label_states import ScoringOptions
from megatron_gkd.teachers.local import LocalTeacher
from megatron_gkd.training.loss import Objective
from megatron_gkd.training.optimizer_state import state_tensors
from megatron_gkd.training.setup import world_of
from megatron_gkd.training.student import Student
from megatron_gkd.training.student_offload import OffloadOptions, StudentOffload

SIZES = dict(hidden_size=512, intermediate_size=1536, num_attention_heads=8, num_key_value_heads=4, head_dim=64)
VOCABULARY, MICROBATCHES, TOKENS, REPEATS = 8192, 16, 48, 5
PRECISE = {"use_precision_aware_optimizer": True}
OPTIMIZERS = {
    "defaults": {},
    "use_precision_aware_optimizer": PRECISE,
    "moments in bf16": PRECISE | {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"},
    "moments in fp8, gradients in bf16": PRECISE
    | {"exp_avg_dtype": "fp8", "exp_avg_sq_dtype": "fp8", "main_grads_dtype": "bf16"},
    "optimizer_cpu_offload": {"optimizer_cpu_offload": True},
    "optimizer_cpu_offload, half": {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5},
}
TEACHERS = {
    "defaults": ScoringOptions(),
    "teacher_states: host": ScoringOptions(on_host=True),
    "teacher_micro_batch_tokens: 384": ScoringOptions(micro_batch_tokens=384),
}
LEAVING = {"offload_model": OffloadOptions(model=True), "offload_optimizer": OffloadOptions(optimizer=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    layers = parser.parse_args().layers
    with world_of(recipe_of({})) as mesh:
        tables = [measure_optimizers(mesh, layers), measure_rollouts(mesh, layers), measure_teachers(mesh, layers)]
        if mesh.is_main:
            print("\n\n".join("\n".join(table) for table in tables))


def recipe_of(memory: dict) -> Recipe:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return Recipe.model_validate(
        {
            "student": {"model": "random"},
            "teacher": {"teacher_kind": "none"},
            "distill": {},
            "parallel": {},
            "memory": memory,
            "data": {"dataset": ["none"]},
            "train": {"global_batch_size": processes, "train_iters": 100, "lr": 1e-5, "dtype": "bf16"},
            "output": {"output_dir": "none"},
        }
    )


def measure_optimizers(mesh: Mesh, layers: int) -> list[str]:
    lines = ["| memory | gradients | optimizer | × update |", "| --- | ---: | ---: | ---: |"]
    plain = None
    for name, memory in OPTIMIZERS.items():
        student = build_student(mesh, layers, memory)
        step_of(student)
        student.update()
        update = median(seconds(student.update) for _ in range(REPEATS))
        plain = plain or update
        gradients = sum(buffer.grad_data.nbytes for chunk in student.chunks for buffer in chunk.buffers)
        state = storage_bytes(state_tensors(student.optimizer), beside=weights_of(student))
        count = num_parameters(student)
        lines.append(f"| {name} | {gradients / count:.2f} B | {state / count:.2f} B | {update / plain:.2f} |")
    return lines


def measure_rollouts(mesh: Mesh, layers: int) -> list[str]:
    lines = ["| memory | freed | leaves and returns |", "| --- | ---: | ---: |"]
    student = build_student(mesh, layers, {})
    for name, options in LEAVING.items():
        step_of(student)
        offload = StudentOffload(student, options)
        took = median(seconds(lambda offload=offload: leave(offload)) for _ in range(REPEATS))
        lines.append(f"| {name} | {offload.freed_bytes / num_parameters(student):.2f} B | {took * 1e3:.0f} ms |")
    return lines


def measure_teachers(mesh: Mesh, layers: int) -> list[str]:
    lines = ["| teacher | states on the device | × scoring | × student |", "| --- | ---: | ---: | ---: |"]
    student, model = build_student(mesh, layers, {}), build_model(mesh, 2 * layers)
    microbatches, plain = [random_microbatch(VOCABULARY, TOKENS, index) for index in range(MICROBATCHES)], None
    for name, options in TEACHERS.items():
        teacher = LocalTeacher(model, head_rows=VOCABULARY, options=options)
        score_and_train(teacher, student, microbatches)
        times = [score_and_train(teacher, student, microbatches) for _ in range(REPEATS)]
        scoring, training = (median(column) for column in zip(*times, strict=True))
        plain = plain or (scoring, training)
        signals = teacher.score(microbatches)
        held = 0 if options.on_host else storage_bytes(signal.states.shard for signal in signals if signal)
        lines.append(f"| {name} | {held / 1e6:.2f} MB | {scoring / plain[0]:.2f} | {training / plain[1]:.2f} |")
    return lines


def score_and_train(teacher: LocalTeacher, student: Student, microbatches: list[Microbatch]) -> tuple[float, float]:
    signals: list = []
    scoring = seconds(lambda: signals.extend(teacher.score(microbatches)))
    return scoring, seconds(lambda: student.compute_gradients(microbatches, ReadOnce(signals)))


def leave(offload: StudentOffload) -> None:
    with offload.away():
        pass


def step_of(student: Student) -> None:
    student.compute_gradients([random_microbatch(VOCABULARY, TOKENS, 0)], [None])
    student.update()
    student.compute_gradients([random_microbatch(VOCABULARY, TOKENS, 0)], [None])


def build_model(mesh: Mesh, layers: int) -> MegatronModel:
    """Build a random model, without a checkpoint on disk."""
    config = Qwen3Config(
        **SIZES,
        num_hidden_layers=layers,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    return build_random_model(mesh, config)


def build_student(mesh: Mesh, layers: int, memory: dict) -> Student:
    recipe = recipe_of(memory)
    objective = Objective(mesh, VOCABULARY, upstream=1.0)
    model = build_model(mesh, layers)
    return Student(model, objective, recipe.parallel, recipe.train, train_iters=100, memory=recipe.memory)


def weights_of(student: Student) -> list[Tensor]:
    return [parameter.data for chunk in student.model.chunks for parameter in chunk.parameters()]


def num_parameters(student: Student) -> int:
    return sum(map(Tensor.numel, weights_of(student)))


def storage_bytes(tensors: Iterable[Tensor], beside: Iterable[Tensor] = ()) -> int:
    """Return the bytes of the tensors, each storage once, but for those of `beside`."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    for tensor in beside:
        storages.pop(tensor.untyped_storage()._cdata, None)
    return sum(storages.values())


def seconds(work: Callable[[], object]) -> float:
    dist.barrier()
    portability.synchronize()
    start = time.perf_counter()
    work()
    portability.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
