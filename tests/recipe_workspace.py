"""A folder with everything that a recipe names: model configurations, data files and the recipe itself."""

import json
from pathlib import Path
from typing import Any

from megatron_gkd.config.errors import RecipeError
from megatron_gkd.config.load import load
from megatron_gkd.config.schema import Recipe

DENSE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 4096,
    "vocab_size": 320,
}
MIXTURE = {
    **DENSE,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_local_experts": 8,
    "moe_intermediate_size": 32,
}
VISION = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "text_config": {key: value for key, value in DENSE.items() if key not in ("architectures", "model_type")},
    "vision_config": {"deepstack_visual_indexes": [0, 1, 2]},
}

RECIPE = """\
student:  {model: student}
teacher:  {teacher_model: teacher, offload_teacher_model: true}
distill:  {beta: 0.5, lmbda: 0.0, temperature: 0.9, sft_alpha: 0.0}
parallel: {tensor_model_parallel_size: 2, pipeline_model_parallel_size: 1, context_parallel_size: 1, \
expert_model_parallel_size: 1, sequence_parallel: true}
data:     {dataset: [train.jsonl], val_dataset: [val.jsonl], max_length: 512, packing: false}
train:    {micro_batch_size: 1, global_batch_size: 8, train_iters: 20, lr: 1.0e-4, seed: 1234}
output:   {output_dir: runs/x, save_interval: 10, log_interval: 1}
"""


class Workspace:
    """Files in `folder`, and the recipe loaded from there; the folder must be the working directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(RECIPE)
        for name in ("train.jsonl", "val.jsonl"):
            (folder / name).write_text("{}\n")
        self.model("student", DENSE)
        self.model("teacher", DENSE)

    def model(self, name: str, config: dict[str, Any]) -> None:
        (self.folder / name).mkdir(exist_ok=True)
        (self.folder / name / "config.json").write_text(json.dumps(config))

    def load(self, *overrides: str, world_size: int = 2, **options: Any) -> Recipe:
        """Load the recipe; `options` are those of `megatron_gkd.config.load.load`."""
        return load(self.recipe, list(overrides), world_size=world_size, **options)

    def problems(self, *overrides: str, world_size: int = 2, require_paths: bool = True) -> list[str]:
        """Return the problems of the recipe; none if it is right."""
        try:
            self.load(*overrides, world_size=world_size, require_paths=require_paths)
        except RecipeError as error:
            return error.problems
        return []
