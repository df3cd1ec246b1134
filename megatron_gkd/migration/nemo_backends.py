"""What NeMo-RL's two training backends have beside settings with keys of their own."""

from __future__ import annotations

import re

from megatron_gkd.migration.draft import Draft
from megatron_gkd.migration.nemo_settings import NemoSettings
from megatron_gkd.migration.nemo_tables import REASONS

_FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
_EXPERTS = re.compile(r"moe|mixtral|-a\d+(\.\d+)?b", re.IGNORECASE)  # in names of models
_OF_EXPERTS = ("freeze_moe_router", "moe_router_dtype", "moe_token_dispatcher_type", "moe_shared_expert_overlap")


def read_megatron(settings: NemoSettings, draft: Draft) -> None:
    """Read what Megatron-Core's backend has beside the plain settings: recomputing, adapters and FP8."""
    leaves, place = draft.leaves, "policy.megatron_cfg"
    if leaves.get("expert_model_parallel_size", 1) == 1 and not _EXPERTS.search(str(leaves.get("model"))):
        for leaf in _OF_EXPERTS:
            leaves.pop(leaf, None)
    if settings.get(f"{place}.activation_checkpointing") is True:
        is_selective = settings.get(f"{place}.recompute_granularity") == "selective"
        leaves |= {"recompute_granularity": "selective"} if is_selective else _FULL
        if is_selective and settings.get(f"{place}.recompute_modules"):
            leaves["recompute_modules"] = settings.get(f"{place}.recompute_modules")
    for name in ("recompute_granularity", "recompute_modules"):
        settings.get(f"{place}.{name}")
    if leaves.get("optimizer_cpu_offload"):
        leaves["optimizer_offload_fraction"] = settings.get(f"{place}.optimizer.optimizer_offload_fraction", 1.0)
    settings.get(f"{place}.optimizer.optimizer_offload_fraction")
    _read_adapters(settings, draft)
    if settings.get(f"{place}.fp8_cfg.enabled") is True:
        leaves["fp8_format"] = settings.get(f"{place}.fp8_cfg.fp8")
        leaves["fp8_recipe"] = settings.get(f"{place}.fp8_cfg.fp8_recipe", "delayed")
    else:
        settings.get(f"{place}.fp8_cfg")


def _read_adapters(settings: NemoSettings, draft: Draft) -> None:
    leaves, place = draft.leaves, "policy.megatron_cfg"
    if settings.get(f"{place}.peft.enabled") is True:
        leaves["tuner_type"] = "lora"
        for name, leaf in (("dim", "lora_rank"), ("alpha", "lora_alpha"), ("dropout", "lora_dropout")):
            if settings.get(f"{place}.peft.{name}") is not None:
                leaves[leaf] = settings.get(f"{place}.peft.{name}")
        if settings.get(f"{place}.peft.target_modules"):
            leaves["target_modules"] = settings.get(f"{place}.peft.target_modules")
    else:
        settings.get(f"{place}.peft")


def read_dtensor(settings: NemoSettings, draft: Draft) -> None:
    """Read what the DTensor backend has beside the plain settings: recomputing, Adam's decays and the schedule."""
    leaves = draft.leaves
    if settings.get("policy.dtensor_cfg.activation_checkpointing") is True:
        leaves |= _FULL
    betas = settings.get("policy.optimizer.kwargs.betas")
    if isinstance(betas, list) and len(betas) == 2:
        leaves["adam_beta1"], leaves["adam_beta2"] = betas
    settings.get("policy.optimizer.kwargs.foreach")
    settings.get("policy.optimizer.kwargs.fused")
    entries = settings.get("policy.scheduler")
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict):
            continue
        name, options = str(entry.get("name", "")), entry.get("kwargs")
        options = options if isinstance(options, dict) else {}
        if name.endswith("LinearLR") and isinstance(options.get("total_iters"), int):
            leaves["lr_warmup_iters"] = options["total_iters"]
        elif name.endswith("CosineAnnealingLR"):
            leaves |= {"lr_decay_style": "cosine", "min_lr": options.get("eta_min", 0.0)}
        elif name and not name.endswith("ConstantLR"):
            draft.skip("policy.scheduler", name, REASONS["policy.scheduler"])
