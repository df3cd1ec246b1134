"""Check a recipe and print what the job scripts need of it, as assignments of a shell.

Usage: python recipe_values.py NODES NPROC RECIPE [--leaf value ...]
"""

import os
import shlex
import subprocess
import sys
import warnings

from megatron_gkd.config.errors import RecipeError
from megatron_gkd.config.load import load
from megatron_gkd.config.schema import Recipe

_SYNC_OPTIONS = {
    "folder": "",
    "nccl": """--weight-transfer-config '{"backend": "nccl"}'""",
    "gloo": """--weight-transfer-config '{"backend": "gloo"}' """
    "--worker-extension-cls megatron_gkd.rollout.vllm_worker.WorkerExtension",
}

_MAX_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM 0.32 takes."""


def main(nodes: str, nproc: str, path: str, *overrides: str) -> int:
    world_size = int(nodes) * (_num_gpus() if nproc == "gpu" else int(nproc))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the training prints them
            recipe = load(path, overrides, world_size=world_size)
    except RecipeError as error:
        print("\n".join(f"{path}: {problem}" for problem in error.problems), file=sys.stderr)
        return error.exit_code
    for name, value in values(recipe).items():
        print(f"{name}={shlex.quote(value)}")
    return 0


def values(recipe: Recipe) -> dict[str, str]:
    """Return the values by the names that they have in the job scripts."""
    length = recipe.data.max_length
    rollout = f"{shlex.quote(recipe.student.model)} --max-model-len {length}"
    if recipe.rollout.weight_sync == "lora" and recipe.lora is not None:
        rank = max(recipe.lora.lora_rank, *recipe.lora.rank_pattern.values(), 0)
        sync = f"--enable-lora --max-lora-rank {next((most for most in _MAX_LORA_RANKS if most >= rank), rank)}"
    else:
        sync = _SYNC_OPTIONS[recipe.rollout.weight_sync]
    return {
        "output_dir": str(recipe.output.output_dir),
        "rollout_options": f"{rollout} {sync}".rstrip(),
        "teacher_options": f"--max-model-len {length + 1} --max-logprobs {recipe.distill.gkd_logits_topk or 64}",
    }


def _num_gpus() -> int:
    if "SLURM_GPUS_ON_NODE" in os.environ:
        return int(os.environ["SLURM_GPUS_ON_NODE"])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    except OSError:
        listed = ""
    return max(1, len(listed.splitlines()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
