"""Costs that are written by hand, and recipes of small models, for what the planner makes of measurements."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from recipe_workspace import Workspace

from megatron_gkd.config.commands import PLANS
from megatron_gkd.config.load import load
from megatron_gkd.config.schema import Recipe
from megatron_gkd.planning.cluster import Assumptions, Cluster
from megatron_gkd.planning.costs import ForwardCosts, ModelCosts, RankCosts, Traffic
from megatron_gkd.planning.devices import Device
from megatron_gkd.planning.model_sizes import ModelSizes

GIB = 2**30
DEVICE = Device(
    name="test", memory_gb=80, bf16_tflops=100, memory_gb_s=1000, nvlink_gb_s=100, network_gb_s=10, host_gb_s=20
)
CLUSTER = Cluster(gpus=16, gpus_per_node=8, device=DEVICE, gpu_memory=80 * GIB)
EXACT = Assumptions(reserve=1 * GIB, mfu=1.0, bandwidth_efficiency=1.0, vllm_step_s=0.0, embedded_layer_s=0.0)
SIZES = ModelSizes(
    parameters=8 * 10**9,
    experts=0,
    embedding=5 * 10**8,
    largest_tensor=GIB // 4,
    largest_experts=0,
    layers=8,
    hidden_size=64,
    vocab_size=320,
    num_experts=0,
    experts_per_token=0,
    kv_values=1024,
    kv_heads=2,
)

FORWARD = ForwardCosts(
    kept=2 * GIB,
    transient=1 * GIB,
    in_flight=3,
    loss=0,
    peak=7 * GIB,
    forward_flops=1e12,
    backward_flops=2e12,
    loss_flops=0.0,
    microbatches=4,
    microbatch_tokens=256,
)
STUDENT = ModelCosts(
    parameters=10**9,
    trainable=10**9,
    layers=4,
    weights=2 * GIB,
    weights_resident=2 * GIB,
    weights_host=0,
    gradients=4 * GIB,
    optimizer=3 * GIB,
    optimizer_host=0,
    update=GIB // 2,
    forward=FORWARD,
)
TEACHER = ModelCosts(
    parameters=10**10,
    trainable=0,
    layers=4,
    weights=20 * GIB,
    weights_resident=1 * GIB,
    weights_host=19 * GIB,
    gradients=0,
    optimizer=0,
    optimizer_host=0,
    update=0,
    forward=replace(FORWARD, kept=0, in_flight=1, peak=3 * GIB, transient=3 * GIB, backward_flops=0.0),
)


def rank(stage: int = 0, **changes: Any) -> RankCosts:
    """Return the costs of a rank of a stage, of 8 ranks, with an offloaded teacher."""
    made = RankCosts(rank=8 * stage, stage=stage, num_ranks=8, student=STUDENT, teachers={"teacher": TEACHER})
    return replace(made, **changes)


def traffic(phase: str, link: str, group_size: int, operation: str, num_bytes: int, count: int = 1) -> Traffic:
    return Traffic(phase, link, group_size, operation, num_bytes, count)  # type: ignore[arg-type]


def load_plan(made: Workspace, *overrides: str, gpus: int = 16) -> Recipe:
    """Load a recipe as the command plan does."""
    return load(made.recipe, overrides, world_size=gpus, command=PLANS)
