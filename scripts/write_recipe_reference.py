"""Write docs/recipes.md, the reference of the recipe's keys: python scripts/write_recipe_reference.py."""

from pathlib import Path

from megatron_gkd.config.reference import recipe_reference

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
INTRODUCTION = """\
# Recipes

A recipe is one YAML file with a mapping for each section. It is read and checked before any process starts; all
problems are reported at once, one line each. `megatron-gkd check recipe.yaml --nproc 8` does the same without training
and prints every key with its value. Complete examples are in `scripts/recipes`.

```yaml
student: {model: Qwen/Qwen3-0.6B}
teacher: {teacher_model: Qwen/Qwen3-8B}
distill: {beta: 0.5, lmbda: 0.5}
data:    {dataset: [train.jsonl], max_length: 2048}
train:   {train_iters: 1000, global_batch_size: 64}
output:  {output_dir: runs/first}
```

Every key can be given on the command line, too, as `--key value` or `--section.key value`; values are YAML. A
true-or-false key may stand alone (`--packing`), and a list takes several values (`--dataset a.jsonl b.jsonl`).
`megatron-gkd train --help` prints the same reference as below, which is generated from the schema by
`scripts/write_recipe_reference.py`.
"""


def page() -> str:
    """Return the whole page."""
    return f"{INTRODUCTION}\n{recipe_reference()}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
