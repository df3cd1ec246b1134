"""Every multimodal family: what transformers computes for rows with images and without, and the comparison with it."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from families.case import LAYOUTS, Reference, _worst, _wrong_tensors, read
from vision.vision_rows import SPECS, VIDEO_SPECS, Spec, image_rows, token_types
from vision_checkpoints import tiny_vision_checkpoint

ROWS = SPECS[:4]  # two images, none, one, none; each is a microbatch
DENSE = ("TP2", "TP2+SP", "PP2", "CP2")
MIXTURE = ("TP2+SP", "PP2", "CP2", "EP2", "TP2+SP+EP2")


@dataclass(frozen=True)
class VisionCase:
    """A multimodal family, or a variant of it.

    Attributes:
        name: that of its checkpoint in `vision_checkpoints` and, after a comma, what is special.
        layouts: those beside TP1 that it exists for.
        tolerance: the largest relative error of logits and gradients.
        has_videos: whether the rows have videos, too.
        has_joined_experts: whether exports have all experts of a layer in one tensor, which transformers reads, too.
    """

    name: str
    layouts: tuple[str, ...]
    tolerance: float = 1e-5
    has_joined_experts: bool = False
    has_videos: bool = False

    @property
    def rows(self) -> list[Spec]:
        """What the rows are made of; each is a microbatch."""
        return VIDEO_SPECS if self.has_videos else ROWS


CASES = (
    VisionCase("qwen2_vl", DENSE),
    VisionCase("qwen2_5_vl", DENSE),
    VisionCase("qwen2_5_vl_tied", DENSE),
    VisionCase("qwen2_5_vl, configuration as released", DENSE),
    VisionCase("qwen3_vl", DENSE),
    VisionCase("qwen3_vl_tied", DENSE),
    VisionCase("qwen3_vl_moe", MIXTURE),
    VisionCase("qwen3_5", ("TP2", "TP2+SP", "PP2"), tolerance=1e-4),
    VisionCase("qwen3_5_moe", ("TP2+SP", "PP2", "EP2"), tolerance=1e-4, has_joined_experts=True),
    VisionCase("internvl", DENSE),
    VisionCase("internvl, dynamic rope", DENSE),
    VisionCase("internvl_qwen3", DENSE),
    VisionCase("glm4v", DENSE),
    VisionCase("glm4v_moe", MIXTURE),
    VisionCase("llama4", MIXTURE),
)
"""Every family; the variants of one family follow it."""


def open_reference(path: Path):
    """Return transformers' model of a checkpoint."""
    from transformers import AutoModelForImageTextToText
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    ROPE_INIT_FUNCTIONS.pop("default", None)  # mcore-bridge registers its own for all models of the process
    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def compute_logits(model, rows: list[Spec] = ROWS) -> torch.Tensor:
    """Return the logits [tokens, V] of rows, one after the other, and add the gradients of their mean loss."""
    total, count, logits = torch.zeros(()), 0, []
    for row in image_rows(model.config, rows):
        ids, labels = torch.from_numpy(row.sample.input_ids), torch.from_numpy(row.sample.labels)
        kinds = {"mm_token_type_ids": token_types(ids[None])} if row.positions.shape[0] == 3 else {}
        out = model(input_ids=ids[None], use_cache=False, **kinds, **row.pixels).logits[0]
        logits.append(out.detach())
        total = total + torch.nn.functional.cross_entropy(out, labels, reduction="sum")
        count += int((labels != -100).sum())
    (total / count).backward()
    return torch.cat(logits)


def checkpoint_of(case: VisionCase) -> Path:
    """Return a checkpoint of a case."""
    name, _, variant = case.name.partition(", ")
    path = tiny_vision_checkpoint(name, seed=3)
    if not variant:
        return path
    folder = Path(tempfile.mkdtemp(prefix=f"tiny-{name}-"))
    shutil.copytree(path, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    if variant == "dynamic rope":
        config["text_config"]["rope_parameters"] |= {"rope_type": "dynamic", "factor": 2.0}
    else:  # without a part for the language model, and with a kind of rotary embedding of its own
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        text |= {"rope_theta": rope["rope_theta"]}
        text |= {"rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
        config = {key: text[key] for key in text if key not in ("model_type", "layer_types", "dtype")} | config
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@functools.cache
def reference(case: VisionCase) -> tuple[Path, Reference]:
    """Return a checkpoint of a case, and what transformers computes with it."""
    path = checkpoint_of(case)
    model = open_reference(path)
    found = Reference(compute_logits(model, case.rows))
    found.take_gradients(model)
    stored = read(path)
    for name, gradient in found.gradients.items():
        if gradient.shape != stored[name].shape:  # Qwen3-VL's files have transposed experts, which transformers forgets
            found.gradients[name] = gradient.transpose(1, 2)
    return path, found


def measure(
    rank: int,
    world_size: int,
    path: Path,
    expected: Reference,
    layout: str,
    export: Path | None = None,
    rows: list[Spec] = ROWS,
):
    """Return the errors of this rank's world: logits on the last stage's ranks, the rest on rank 0. A worker."""
    from logits import relative_error
    from vision.vision_runs import TRAINED, build, merged, named_gradients

    from megatron_gkd.models.export import export_checkpoint
    from megatron_gkd.runtime.mesh import destroy_mesh

    changes = {"parallel": LAYOUTS[layout], "train": {"moe_aux_loss_coeff": 0.0}}
    student, _, steps = build(path, None, merged(TRAINED, changes), rows)
    try:
        logits = _logits_of_megatron(student.model, steps[0])
        lengths = [len(row.sample.input_ids) for row in image_rows(student.model.checkpoint.config, rows)]
        own = [microbatch.samples[0].row_id for microbatch in steps[0]]  # of this data-parallel rank
        expected_logits = torch.cat([expected.logits.split(lengths)[row] for row in own])
        if export is not None:
            export_checkpoint(student.model, export)
        exported = {name: tensor.clone() for name, tensor in student.model.named_tensors()}
        student.compute_gradients(steps[0], [None] * len(steps[0]), force_all_reduce=True)
        gradients = named_gradients(student)
    finally:
        destroy_mesh()
    error = None if logits is None else relative_error(logits, expected_logits)
    if rank != 0:
        return error, None
    return error, (*_worst(gradients, expected.gradients), _wrong_tensors(read(path), exported))


@torch.no_grad()
def _logits_of_megatron(model, microbatches) -> torch.Tensor | None:
    """Return the logits [tokens, V] of microbatches of one row each, on the last stage's ranks; None elsewhere."""
    from megatron_gkd.models.megatron_model import hidden_states, in_eval_mode
    from megatron_gkd.models.pipeline import Pipeline
    from megatron_gkd.runtime.context_parallel import context_parallel_indices

    mesh, head = model.mesh, model.head_weight

    def logits(hidden, microbatch):
        rows = hidden.squeeze(0)
        if mesh.layout.sequence_parallel:
            rows = _gathered(rows, mesh.tp, 0)
        own = _gathered(rows @ head.T, mesh.tp, 1)[:, : model.checkpoint.vocab_size]
        in_rank_order = _gathered(own, mesh.cp, 0)
        size = mesh.cp.size()
        places = [context_parallel_indices(microbatch.cu_seqlens, rank, size) for rank in range(size)]
        return in_rank_order[torch.cat(places).argsort()][: len(microbatch.samples[0].input_ids)]

    with in_eval_mode(model.chunks):
        found = Pipeline(model.chunks, mesh).forward_only(microbatches, hidden_states, logits)
    return None if found[-1] is None else torch.cat(found)


def _gathered(x: torch.Tensor, group, dim: int) -> torch.Tensor:
    parts = [torch.empty_like(x) for _ in range(group.size())]
    torch.distributed.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim)
