"""NeMo-RL: the configuration of its on-policy distillation."""

from __future__ import annotations

from typing import Any

from megatron_gkd.migration.draft import Draft
from megatron_gkd.migration.nemo_backends import read_dtensor, read_megatron
from megatron_gkd.migration.nemo_settings import NemoSettings
from megatron_gkd.migration.nemo_tables import COMMON, DATASETS, DTENSOR, MEGATRON, REASONS

_DEFAULTS: dict[str, Any] = {"lmbda": 1.0, "temperature": 1.0, "lr_decay_style": "constant", "save_total_limit": None}
_SHOWN = 5  # settings in a line of the report
_DTYPES = {"bfloat16": "bf16", "float32": "fp32"}
_BETAS = {"forward": 0.0, "reverse": 1.0}


def read_nemo(tree: dict[str, Any], draft: Draft) -> None:
    """Write a configuration to the draft."""
    settings, leaves = NemoSettings(tree), draft.leaves
    is_megatron = settings.get("policy.megatron_cfg.enabled") is True
    for name, setting in (COMMON | (MEGATRON if is_megatron else DTENSOR)).items():
        value = settings.get(name) if setting.is_written else None
        if value is not None:
            leaves[setting.leaf] = value
    draft.nproc, draft.nodes = settings.number("cluster.gpus_per_node"), settings.number("cluster.num_nodes") or 1
    dtype = settings.get("policy.precision")
    if str(dtype) in _DTYPES:
        leaves["dtype"] = _DTYPES[str(dtype)]
    elif dtype is not None:
        draft.skip("policy.precision", dtype, "must be bfloat16 or float32")
    _read_loss(settings, draft)
    _read_steps(settings, draft)
    _read_data(settings, draft)
    _read_generation(settings, draft)
    if is_megatron:
        read_megatron(settings, draft)
    else:
        read_dtensor(settings, draft)
    draft.fill(_DEFAULTS)
    if leaves.get("packing"):
        leaves["micro_batch_size"] = 1
    _skip_unread(settings, draft, is_megatron=is_megatron)


def _read_loss(settings: NemoSettings, draft: Draft) -> None:
    kind = settings.get("loss_fn.kl_type")
    if str(kind) in _BETAS:
        draft.leaves["beta"] = _BETAS[str(kind)]
        settings.get("loss_fn.mixed_kl_weight")
    elif kind is not None:
        draft.leaves["beta"] = 0.5
        draft.skip("loss_fn.kl_type", kind, "the recipe has the Jensen-Shannon divergence (beta 0.5) in its place")


def _read_steps(settings: NemoSettings, draft: Draft) -> None:
    """Read the numbers of steps, which count generations there and updates here."""
    leaves, batch = draft.leaves, settings.number("policy.train_global_batch_size")
    samples = (settings.number("distillation.num_prompts_per_step") or 1) * (
        settings.number("distillation.num_generations_per_prompt") or 1
    )
    updates = samples // batch if batch and samples > batch and samples % batch == 0 else 1
    if updates > 1:
        leaves["steps_per_generation"] = updates
        draft.notes.append(
            f"rollout.steps_per_generation = {updates}: the steps of train_iters, eval_interval and save_interval are "
            f"updates here, of which a step of NeMo-RL makes {updates}"
        )
    elif settings.number("distillation.num_prompts_per_step"):
        leaves["global_batch_size"] = samples
    for name, leaf in (
        ("distillation.max_num_steps", "train_iters"),
        ("distillation.val_period", "eval_interval"),
        ("checkpointing.save_period", "save_interval"),
    ):
        number = settings.number(name)
        if number is not None:
            leaves[leaf] = number * updates
    if "train_iters" not in leaves and settings.get("distillation.max_num_epochs"):
        leaves["num_train_epochs"] = settings.get("distillation.max_num_epochs")
    elif settings.get("distillation.max_num_epochs"):
        epochs = settings.get("distillation.max_num_epochs")
        draft.skip("distillation.max_num_epochs", epochs, REASONS["distillation.max_num_epochs"])
    if settings.get("checkpointing.enabled", True) is False:
        leaves["save_interval"] = None


def _read_data(settings: NemoSettings, draft: Draft) -> None:
    for name, leaf in (("data.train", "dataset"), ("data.validation", "val_dataset")):
        entries = settings.get(name)
        found = [_dataset(entry, f"{name}.", draft) for entry in _entries(entries)]
        if any(found):
            draft.leaves[leaf] = [one for one in found if one]
    old = {"dataset_name": settings.get("data.dataset_name"), "data_path": settings.get("data.train_data_path")}
    if "dataset" not in draft.leaves and (found := [_dataset(old, "data.", draft)])[0]:
        draft.leaves["dataset"] = found
    draft.drop_validation_without_rows()


def _entries(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, dict)]


def _dataset(entry: dict[str, Any], place: str, draft: Draft) -> str | None:
    """Return the data set of an entry; None where it has no name that is known."""
    path, name = entry.get("data_path"), entry.get("dataset_name")
    for key in ("prompt_file", "system_prompt_file", "repeat", "split_validation_size", "input_key", "output_key"):
        if entry.get(key):
            draft.skip(f"{place}{key}", entry[key], _ENTRY_REASONS.get(key, REASONS["data"]))
    if path:
        return str(path)
    if str(name) in DATASETS:
        return DATASETS[str(name)]
    if name and "/" in str(name):
        return str(name)
    if name:
        draft.skip(f"{place}dataset_name", name, "NeMo-RL's own name of a data set; write its path or hub id in data")
    return None


_ENTRY_REASONS = {
    "prompt_file": REASONS["data.default.prompt_file"],
    "system_prompt_file": "set data.system",
    "repeat": "write #n behind the data set, with n the number of rows after repetition",
    "split_validation_size": "set data.split_dataset_ratio",
    "input_key": "set data.columns: {NAME: prompt}",
    "output_key": "set data.columns: {NAME: response}",
}


def _read_generation(settings: NemoSettings, draft: Draft) -> None:
    leaves, place = draft.leaves, "policy.generation"
    backend = settings.get(f"{place}.backend")
    if backend == "vllm" and settings.get(f"{place}.colocated.enabled", True) is False:
        leaves["engine"] = "vllm_server"
        leaves.setdefault("vllm_server_urls", ["http://localhost:8000"])
        draft.notes.append(
            "rollout.vllm_server_urls = http://localhost:8000: start `vllm serve` on GPUs of its own, and write "
            "its address"
        )
    elif backend in ("vllm", "megatron"):
        leaves["engine"] = backend
    elif backend is not None:
        draft.skip(f"{place}.backend", backend, "must be vllm or megatron")
    if (settings.number(f"{place}.vllm_cfg.expert_parallel_size") or 1) > 1:
        leaves["vllm_enable_expert_parallel"] = True
    if leaves.get("engine") != "vllm":
        for leaf in [leaf for leaf in leaves if leaf.startswith("vllm_") and not leaf.startswith("vllm_server")]:
            del leaves[leaf]
    if not leaves.get("vllm_engine_kwargs"):
        leaves.pop("vllm_engine_kwargs", None)
    prompt = settings.number("data.max_input_seq_length")
    completion, longest = settings.number(f"{place}.max_new_tokens"), leaves.get("max_length")
    if completion is None or not isinstance(longest, int):
        return
    if completion >= longest:  # prompt and completion share the sequence
        draft.notes.append(
            f"rollout.max_completion_length = {longest * 3 // 4}: a prompt and its completion share data.max_length "
            f"({longest}) here, so that max_new_tokens = {completion} leaves no room; prompts have the rest"
        )
        completion = longest * 3 // 4
    leaves["max_completion_length"] = completion
    leaves["max_prompt_length"] = min(prompt or longest, longest - completion)


def _skip_unread(settings: NemoSettings, draft: Draft, *, is_megatron: bool) -> None:
    """Note what was not read; one line for what has one reason as a whole."""
    settings.get("policy.dtensor_cfg" if is_megatron else "policy.megatron_cfg")
    if is_megatron:
        for name in ("policy.optimizer", "policy.scheduler", "policy.automodel_cfg"):
            settings.get(name)
    together: dict[str, list[str]] = {}
    for name, value in settings.unread().items():
        place = max((one for one in REASONS if name == one or name.startswith(f"{one}.")), key=len, default="")
        if place == name or not place:
            draft.skip(name, value, REASONS.get(place, "unknown; no key of a recipe has this meaning"))
        else:
            together.setdefault(place, []).append(name.removeprefix(f"{place}."))
    for place, names in together.items():
        shown = [*names[:_SHOWN], *(["..."] if len(names) > _SHOWN else [])]
        draft.skip(place, "{" + ", ".join(shown) + "}", REASONS[place])
