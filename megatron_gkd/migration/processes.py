"""How another tool's processes are started: their number, nodes and environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_gkd.migration.draft import Draft

_KEPT = ("CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "HF_HOME", "HF_ENDPOINT")
_KEPT_BEGINNINGS = ("NCCL_", "GLOO_", "NVTE_", "VLLM_", "MODELSCOPE_")
_READ = ("NPROC_PER_NODE", "NNODES", "USE_HF", "MAX_PIXELS", "MIN_PIXELS")
_OF_LAUNCHERS = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "OMP_NUM_THREADS")
_IMAGE_TOKENS = (
    "set data.max_pixels, which is the number of image tokens times the pixels of one (32 x 32 for Qwen3-VL and "
    "Qwen3.5, 28 x 28 for Qwen2.5-VL)"
)
_REASONS = {
    "IMAGE_MAX_TOKEN_NUM": _IMAGE_TOKENS,
    "IMAGE_MIN_TOKEN_NUM": _IMAGE_TOKENS.replace("max_pixels", "min_pixels"),
    "WANDB_PROJECT": "metrics go to TensorBoard and output_dir/metrics.jsonl",
    "WANDB_API_KEY": "metrics go to TensorBoard and output_dir/metrics.jsonl",
    "CUDA_DEVICE_MAX_CONNECTIONS": "is set where the layout needs it",
}
_PROCESSES = ("--nproc_per_node", "--nproc-per-node", "--num_processes", "--num-processes")
_NODES = ("--nnodes", "--num_machines", "--num-machines")


def read_processes(environment: Mapping[str, str], launcher: Sequence[str], draft: Draft) -> None:
    """Write the number of processes and nodes, and the environment, to the draft.

    Args:
        environment: variables of the command.
        launcher: the words before the trainer's own options (`torchrun --nproc_per_node 4 train.py`).
        draft: the recipe.
    """
    devices = environment.get("CUDA_VISIBLE_DEVICES", "").strip(",")
    total = _option(launcher, _PROCESSES)
    nodes = _positive(environment.get("NNODES") or _option(launcher, _NODES) or "1") or 1
    nproc = _positive(environment.get("NPROC_PER_NODE") or total or "")
    if nproc and any(word.startswith(("--num_processes", "--num-processes")) for word in launcher):
        nproc = max(1, nproc // nodes)  # accelerate counts the processes of all nodes
    draft.nproc = nproc or (len(devices.split(",")) if devices else None)
    draft.nodes = nodes
    for name, value in environment.items():
        if name in _KEPT or name.startswith(_KEPT_BEGINNINGS):
            draft.environment[name] = value
        elif name not in (*_READ, *_OF_LAUNCHERS):
            draft.skip(name, value, _REASONS.get(name, "a variable of the environment that is not read here"))


def _option(words: Sequence[str], names: Sequence[str]) -> str | None:
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in names:
            return value if equals else next(iter(words[index + 1 :]), None)
    return None


def _positive(text: str) -> int | None:
    return int(text) if text.isdecimal() and int(text) > 0 else None
