"""Write docs/migrating.md, the guide for users of other trainers: python scripts/write_migration_guide.py."""

import re
from collections.abc import Iterable
from pathlib import Path

from megatron_gkd.config import keys, yaml_text
from megatron_gkd.config.aliases import ALIASES, HELD, UNSUPPORTED, VALUES
from megatron_gkd.config.aliases.entry import NEMO, SWIFT, TRL
from megatron_gkd.migration import nemo_tables as nemo

PAGE = Path(__file__).parents[1] / "docs" / "migrating.md"
INTRODUCTION = """\
# Migrating from other trainers

```bash
megatron-gkd migrate args.sh                          # of ms-swift or TRL; writes recipe.yaml
megatron-gkd migrate args.yaml --from trl --output gkd.yaml
megatron-gkd check recipe.yaml --nproc 8
```

`megatron-gkd migrate` reads a shell script (`megatron rlhf`, `swift rlhf`, TRL's `gkd.py`, NeMo-RL's
`run_distillation.py`; behind variables, launchers and continued lines) or a YAML file. It writes a recipe, lists what
it leaves out with the reason, says what is different here, and prints the command that starts the run. Defaults of
the other tool that are not those of this package are written out.

The names below are also accepted in recipes, in the section of their key, and on the command line: `--torch_dtype
bfloat16 --save_steps 100`. A recipe that a run writes back has the keys alone. A name beside its key is an error.
Settings that hold here anyway are accepted with the values that hold. What is not supported is refused with the
reason.

## Same name, other meaning

The mixture is the same everywhere: β weighs the teacher in M = β·P + (1−β)·S, β = 0 is forward KL (teacher to
student), β = 1 reverse KL. These names are keys here, with the meaning of the last column; `megatron-gkd migrate`
converts the values.
"""
CONFLICTS = (
    ("setting", "ms-swift", "TRL", "NeMo-RL", "this package"),
    (
        "`lmbda`",
        "0.5 by default",
        "0.5 by default; drawn for each microbatch",
        "always 1",
        "0 by default; drawn for each step (`lmbda_granularity`)",
    ),
    (
        "`max_length`",
        "a row; a completion follows its prompt",
        "as ms-swift",
        "prompt and completion",
        "prompt and completion; `max_prompt_length` limits the prompt",
    ),
    (
        "`temperature`",
        "sampling and loss",
        "sampling; the loss is at 1",
        "sampling; the loss is at 1",
        "the loss, and sampling where `rollout_temperature` is null",
    ),
    ("`global_batch_size`", "packed sequences with packing", "—", "—", "rows, packed or not"),
    (
        "`train_iters`, `eval_interval`, `save_interval`",
        "updates",
        "updates",
        "generations, of several updates each",
        "updates",
    ),
    ("`gkd_logits_topk`", "—", "—", "64 in its recipes", "null: the whole vocabulary"),
    (
        "`beta` between 0 and 1",
        "Jensen-Shannon",
        "Jensen-Shannon",
        "`mixed`: a sum of both KL divergences",
        "Jensen-Shannon",
    ),
    (
        "teacher without a name",
        "the student's current weights",
        "the student",
        "—",
        "the same with `teacher_kind: self`, and a `teacher_prompt` in the rows",
    ),
    ("`seed`, `weight_decay`, `adam_beta2`", "42, 0.1, 0.95", "42, 0, 0.999", "42, 0.01, 0.999", "1234, 0.1, 0.95"),
    (
        "hub ids",
        "ModelScope's by default",
        "Hugging Face's",
        "Hugging Face's",
        "Hugging Face's; `use_hf: false` for ModelScope's",
    ),
)
"""The first row is the head."""
MISSING = {
    SWIFT: "Missing here: DoRA, optimizers other than AdamW, rewards, multi-turn rollouts.",
    TRL: "Missing here: callbacks, `report_to` of other loggers than TensorBoard, PEFT methods other than LoRA.",
    NEMO: "Missing here: environments and rewards, multi-turn rollouts, a layout of the teacher's own, Ray.",
}


SAME_NAMES = {
    SWIFT: "model, teacher_model, teacher_model_server, gkd_logits_topk, beta, lmbda, sft_alpha, dataset, "
    "val_dataset, split_dataset_ratio, packing, micro_batch_size, global_batch_size, lr, "
    "tensor_model_parallel_size, lora_rank, "
    "max_completion_length, vllm_gpu_memory_utilization, sleep_level, offload_teacher_model",
    TRL: "beta, lmbda, max_length, packing, num_train_epochs, weight_decay, adam_beta1, adam_beta2, output_dir, "
    "save_total_limit, seed, lora_alpha, lora_dropout",
}


def page() -> str:
    """Return the whole page."""
    head, *rows = CONFLICTS
    blocks = [INTRODUCTION, _table(head, rows), *(_flat(tool) for tool in (SWIFT, TRL)), _nemo()]
    return "\n".join(blocks)


def _flat(tool: str) -> str:
    """Return the section of a tool with flat names."""
    command = {SWIFT: "`megatron rlhf`, `swift rlhf`", TRL: "`GKDConfig`, `ModelConfig`, `ScriptArguments`"}[tool]
    aliases = [
        (f"`{name}`", ", ".join(f"`{keys.SECTION_OF[leaf]}.{leaf}`" for leaf in alias.leaves), alias.note)
        for name, alias in ALIASES.items()
        if tool in alias.tools
    ]
    aliases += _values() if tool == SWIFT else []
    held = [(f"`{name}`", _shown(one.values), one.reason) for name, one in HELD.items() if tool in one.tools]
    parts = [
        f"## {tool}\n",
        f"{command}. Other names are the same: {_same(tool)}.\n",
        _table(("name", "here", "note"), aliases),
        "Accepted, as it holds anyway:\n",
        _table(("name", "value", "because"), held),
        "Not supported:\n",
        _table(("name", "reason, or what to use"), _by_reason(tool)),
        f"{MISSING[tool]}\n",
    ]
    return "\n".join(parts)


def _same(tool: str) -> str:
    return ", ".join(f"`{name}`" for name in SAME_NAMES[tool].split(", ")) + " and more"


def _values() -> list[tuple[str, str, str]]:
    rows = []
    for leaf, values in VALUES.items():
        pairs = ", ".join(f"`{old}`: {_text(new)}" for old, new in values.items())
        rows.append((f"`{leaf}`", f"`{keys.SECTION_OF[leaf]}.{leaf}`", pairs))
    return rows


def _by_reason(tool: str) -> list[tuple[str, str]]:
    names: dict[str, list[str]] = {}
    for name, one in UNSUPPORTED.items():
        if tool in one.tools:
            names.setdefault(one.reason, []).append(f"`{name}`")
    return [(", ".join(found), reason) for reason, found in names.items()]


def _nemo() -> str:
    """Return the section of NeMo-RL, whose names are nested."""
    parts = [
        f"## {NEMO}\n",
        "`run_distillation.py` with a configuration of `policy`, `teacher`, `distillation` and `loss_fn`.\n",
    ]
    for title, settings in (
        ("Settings of both backends:\n", nemo.COMMON),
        ("With `policy.megatron_cfg.enabled`:\n", nemo.MEGATRON),
        ("With `policy.dtensor_cfg.enabled`:\n", nemo.DTENSOR),
    ):
        rows = [(f"`{name}`", f"`{keys.SECTION_OF[one.leaf]}.{one.leaf}`", one.note) for name, one in settings.items()]
        parts += [title, _table((NEMO, "here", "note"), rows)]
    flat = sorted(name for name, alias in ALIASES.items() if alias.tools == (NEMO,))
    parts += [
        "As flat names on the command line: " + ", ".join(f"`{name}`" for name in flat) + ".\n",
        "Not carried over:\n",
        _table((NEMO, "reason, or what to use"), [(f"`{name}`", reason) for name, reason in nemo.REASONS.items()]),
        f"{MISSING[NEMO]}\n",
    ]
    return "\n".join(parts)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(re.sub(r"([|<])", r"\\\1", cell) for cell in row) + " |" for row in rows]
    return "\n".join([*lines, ""])


def _shown(values: tuple[object, ...]) -> str:
    return " or ".join(dict.fromkeys(_text(value) for value in values))


def _text(value: object) -> str:
    return yaml_text.dump(value).split("\n")[0]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
