"""A family of models in a test, what transformers computes, and the comparison of a layout with it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from logits import relative_error, sequences
from rows import RandomRows
from safetensors.torch import load_file

ROWS = RandomRows(count=4)  # one step
NUM_SAMPLED = 6
BUFFERS = ("e_score_correction_bias", "expert_bias")
LAYOUTS = {
    "TP1": {},
    "TP2": {"tensor_model_parallel_size": 2},
    "TP2+SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2},
    "CP2": {"context_parallel_size": 2},
    "EP2": {"expert_model_parallel_size": 2},
    "TP2+SP+EP2": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2},
}
"""The layouts of the generated table, as the recipe's section `parallel`."""


@dataclass(frozen=True)
class Case:
    """A family, or a variant of it.

    Attributes:
        name: its model_type and, after a comma, what is special.
        hf_class: transformers' class of the configuration, without `Config`.
        values: what differs from the sizes of all cases.
        layouts: those beside TP1 that it exists for.
        tolerance: the largest relative error of logits and gradients.
        written_as: the model_type in config.json; None for that of `hf_class`.
    """

    name: str
    hf_class: str
    values: dict[str, Any] = field(hash=False)
    layouts: tuple[str, ...]
    tolerance: float = 1e-5
    written_as: str | None = None


@dataclass
class Reference:
    """What transformers computes.

    Attributes:
        logits: [tokens, V] of the sequences, one after the other.
        gradients: of the mean cross-entropy over the labels of ROWS, by the checkpoint's names.
        completions: NUM_SAMPLED tokens after each of the sequences, each time the most likely; none for images.
    """

    logits: torch.Tensor
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    completions: list[list[int]] = field(default_factory=list)

    @classmethod
    def of_language_model(cls, model) -> Reference:
        """Compute the logits, and leave the gradients in the parameters' `grad`."""
        logits = compute_logits(model)
        completions = [_sample_greedily(model, sequence) for sequence in sequences()]
        total, count = torch.zeros(()), 0
        for index in range(len(ROWS)):
            sample = ROWS[index]
            labels = torch.from_numpy(sample.labels)
            rows = model(torch.from_numpy(sample.input_ids)[None], use_cache=False).logits[0]
            total = total + torch.nn.functional.cross_entropy(rows, labels, reduction="sum")
            count += int((labels != -100).sum())
        (total / count).backward()
        return cls(logits, completions=completions)

    def take_gradients(self, model) -> None:
        """Take transformers' gradients under the checkpoint's names, by saving them as the model's weights."""
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        with tempfile.TemporaryDirectory(prefix="gradients-") as folder:
            model.save_pretrained(folder)
            tensors = read(Path(folder))
        self.gradients = {name: tensor for name, tensor in tensors.items() if not name.endswith(BUFFERS)}


@dataclass
class Errors:
    """The comparison of one layout with transformers.

    Attributes:
        logits: the largest error, relative to the largest logit.
        gradient: the largest error of a gradient, relative to the largest entry of its tensor.
        worst: the name of that tensor.
        export: what is wrong with the exported tensors, in words; empty if they are the checkpoint's bits, and a step
            does not move the routers' biases.
        rollout: `same tokens` as transformers by the embedded engine, `other tokens`, or empty where it was not run.
    """

    logits: float
    gradient: float
    worst: str
    export: str
    rollout: str = ""


@torch.no_grad()
def compute_logits(model) -> torch.Tensor:
    """Return transformers' logits [tokens, V] of the sequences, one after the other."""
    return torch.cat([model(sequence[None]).logits[0] for sequence in sequences()])


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def measure(rank: int, world_size: int, path: Path, expected: Reference, layout: str, export: Path | None = None):
    """Return the errors of this rank's world: logits on the last stage's ranks, the rest on rank 0. A worker."""
    from logits import logits_of_megatron
    from training_layouts import build, named_gradients

    from megatron_gkd.models.export import export_checkpoint
    from megatron_gkd.runtime.mesh import destroy_mesh

    changes = {
        "teacher": {"teacher_kind": "none"},
        "parallel": LAYOUTS[layout],
        "train": {"moe_aux_loss_coeff": 0.0},
    }
    _, student, _, batches = build(path, None, changes, rows=ROWS)
    try:
        logits = logits_of_megatron(student.model)
        if export is not None:
            export_checkpoint(student.model, export)
        exported = {name: tensor.clone() for name, tensor in student.model.named_tensors()}
        rollout = _rollout(student.model, expected.completions) if layout == "TP1" else ""
        microbatches = next(iter(batches))
        student.compute_gradients(microbatches, [None] * len(microbatches), force_all_reduce=True)
        gradients = named_gradients(student)
    finally:
        destroy_mesh()
    error = None if logits is None else relative_error(logits, expected.logits)
    if rank != 0:
        return error, None
    # no gradient moves a buffer: `gradients` has its value after the step's last reduction
    later = {name: gradients[name] if name.endswith(BUFFERS) else tensor for name, tensor in exported.items()}
    export = _wrong_tensors(read(path), exported) or _wrong_tensors(exported, later)
    return error, (*_worst(gradients, expected.gradients), export, rollout)


def errors_of(results) -> Errors:
    """Return the errors of a world from what its ranks have measured."""
    logits = max(error for error, _ in results if error is not None)
    return Errors(logits, *results[0][1])


def rotated(cases: Sequence[Case], index: int) -> str:
    """Return the one layout of two ranks of a case; `scripts/write_model_table.py` runs all of them."""
    layouts = cases[index].layouts
    return layouts[index % len(layouts)]


def assert_close(errors: Errors, tolerance: float, layout: str) -> None:
    """Assert that logits are within the tolerance, and gradients within ten times as much."""
    assert errors.logits <= tolerance, f"{layout}: logits off by {errors.logits:.1e}"
    assert errors.gradient <= 10 * tolerance, f"{layout}: {errors.worst} off by {errors.gradient:.1e}"


def _sample_greedily(model, prompt: torch.Tensor) -> list[int]:
    model.generation_config.eos_token_id = None
    output = model.generate(prompt[None], max_new_tokens=NUM_SAMPLED, do_sample=False, pad_token_id=0)
    return output[0, len(prompt) :].tolist()


def _rollout(model, expected: list[list[int]]) -> str:
    """Sample as `Reference.completions`, where the embedded engine has the model's layers."""
    from megatron_gkd.checkpoint_format.layer_limits import embedded_engine_problems
    from megatron_gkd.rollout.base import Sampling
    from megatron_gkd.rollout.megatron.engine import MegatronEngine

    if any(embedded_engine_problems(model.checkpoint.shape, "")):
        return ""
    prompts = [sequence.tolist() for sequence in sequences()]
    sampling = Sampling(max_completion_length=NUM_SAMPLED, temperature=0, ignore_eos=True)
    found = MegatronEngine(model, []).generate(prompts, sampling, range(len(prompts)))
    return "same tokens" if [one.token_ids for one in found] == expected else "other tokens"


def _worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    missing = expected.keys() - found.keys()
    if missing:
        return float("inf"), f"{min(missing)}, which is missing"
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    errors = []
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-4 * largest)  # some are zero but for rounding
        errors.append((float((found[name].reshape(gradient.shape) - gradient).abs().max()) / scale, name))
    return max(errors)


def _wrong_tensors(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> str:
    for problem, names in (("missing", before.keys() - after.keys()), ("extra", after.keys() - before.keys())):
        if names:
            return f"{problem}: {', '.join(sorted(names)[:3])} ({len(names)})"
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    return f"changed: {', '.join(changed[:3])} ({len(changed)})" if changed else ""
