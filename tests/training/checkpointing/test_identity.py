"""What a resumed run must share with the saved one, and what may differ."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from checkpoints import tiny_checkpoint
from training_layouts import recipe_of

from megatron_gkd.config.schema import DataSection
from megatron_gkd.data.build import build_dataset
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.training.checkpointing.identity import (
    differences,
    recipe_identity,
    revisions_identity,
    rows_identity,
)

CONSTANT = {"train": {"lr_decay_style": "constant"}}
MAY_CHANGE = [
    {"parallel": {"tensor_model_parallel_size": 2, "recompute_granularity": "selective"}},
    {"output": {"output_dir": "elsewhere", "save_interval": 7}},
    {"cluster": {"ddp_timeout": 60.0, "watchdog_s": None}},
    {"memory": {"offload_model": True, "offload_optimizer": True}},
    {"teacher": {"offload_teacher_model": False, "teacher_states": "host", "teacher_micro_batch_tokens": 4096}},
    {"megatron": {"bias_swiglu_fusion": "on", "moe_token_dispatcher_type": "allgather", "moe_grouped_gemm": False}},
    {"teacher": {"teacher_pipeline_model_parallel_layout": "Et|tL"}},
    {"train": {"eval_interval": 3, "max_runtime": 60.0, "resume": "never"}},
]
MUST_STAY = {
    "parallel.distributed_optimizer": {"parallel": {"distributed_optimizer": False}},
    "data.shuffle": {"data": {"shuffle": False}},
    "megatron.freeze_moe_router": {"megatron": {"freeze_moe_router": True}},
    "megatron.megatron_extra_kwargs": {"megatron": {"megatron_extra_kwargs": {"moe_router_fusion": True}}},
    "distill.lmbda": {"distill": {"lmbda": 0.5}},
    "train.global_batch_size": {"train": {"global_batch_size": 2}},
    "train.seed": {"train": {"seed": 5}},
    "train.lr_warmup_iters": {"train": {"lr_warmup_iters": 2}},
    "train.lr_warmup_fraction": {"train": {"lr_warmup_fraction": 0.5}},
    "train.lr_decay_style": CONSTANT,
    "train.tuner_type": {"lora": {}},
}


def with_sections(changes):
    """A recipe with changes in any section."""
    known = recipe_of({name: values for name, values in changes.items() if name not in ("cluster", "memory")})
    extra = {name: changes[name] for name in ("cluster", "memory") if name in changes}
    return type(known).model_validate(known.model_dump() | extra)


def compare(found, saved):
    return differences(recipe_identity(with_sections(found)), recipe_identity(with_sections(saved)), "c")


@pytest.mark.parametrize("changes", MAY_CHANGE, ids=lambda changes: ", ".join(changes))
def test_what_may_change(changes):
    assert compare(changes, {}) == []


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("student", {"model_revision": "v1"}),
        ("teacher", {"teacher_model_revision": "v1"}),
        ("teacher", {"check_tokenizers": "warn"}),
        ("teacher", {"teacher_server_api_key_env": "K"}),
        ("rollout", {"vllm_server_api_key_env": "K"}),
        ("rollout", {"vllm_max_num_seqs": 8, "vllm_enable_prefix_caching": False}),
        ("rollout", {"vllm_enable_expert_parallel": True, "vllm_limit_mm_per_prompt": {"image": 1}}),
    ],
)
def test_what_may_change_in_a_section(section, values):
    assert compare_sections(section, values) == []


def compare_sections(section, values):
    recipe = with_sections({"distill": {"lmbda": 1.0}})  # a run that samples: others have no use for such keys
    tree = recipe.model_dump()
    tree[section] = tree[section] | values
    return differences(recipe_identity(type(recipe).model_validate(tree)), recipe_identity(recipe), "c")


@pytest.mark.parametrize(
    ("section", "values", "key"),
    [
        ("student", {"use_hf": False}, "student.use_hf"),
        ("rollout", {"vllm_quantization": "fp8"}, "rollout.vllm_quantization"),
        ("rollout", {"vllm_engine_kwargs": {"block_size": 16}}, "rollout.vllm_engine_kwargs"),
        ("rollout", {"generation_batch_size": 8}, "rollout.steps_per_generation"),
        ("rollout", {"rollout_temperature": 0.5}, "rollout.rollout_temperature"),
    ],
)
def test_what_must_stay_in_a_section(section, values, key):
    (line,) = compare_sections(section, values)
    assert line.startswith(f"{key} = ")


@pytest.mark.parametrize(
    ("values", "same"),
    [
        ({"steps_per_generation": 3}, {"generation_batch_size": 12}),
        ({"steps_per_generation": 1}, {}),
        ({"rollout_temperature": None}, {"rollout_temperature": 0.9}),
    ],
)
def test_values_of_the_same_meaning_are_equal(values, same):
    first, second = ({"distill": {"lmbda": 1.0, "temperature": 0.9}, "rollout": one} for one in (values, same))
    assert compare(first, second) == []


def test_keys_of_rollouts_do_not_matter_without_any():
    assert compare({"rollout": {"rollout_temperature": 0.5, "max_completion_length": 7}}, {}) == []


def test_the_commits_of_downloaded_models_must_stay():
    checkpoint = Checkpoint.open(str(tiny_checkpoint("qwen3")))
    assert revisions_identity(checkpoint, {"teacher": checkpoint}) == {}
    first, second = (
        revisions_identity(replace(checkpoint, revision=commit), {"teacher": replace(checkpoint, revision="c")})
        for commit in ("a", "b")
    )
    assert differences(first, first, "c") == []
    assert differences(second, first, "c") == ["student.model (its revision) = b: the checkpoint c was trained with a"]


def test_a_teacher_that_nothing_names_is_the_student():
    unnamed, named = ({"teacher": {"teacher_kind": kind, "teacher_model": None}} for kind in (None, "self"))
    assert compare(unnamed, named) == compare(named, unnamed) == []
    assert compare(unnamed, {}) != []


@pytest.mark.parametrize("key", MUST_STAY)
def test_what_must_stay_is_named(key):
    lines = compare(MUST_STAY[key], {})
    assert any(line.startswith(f"{key} = ") and ": the checkpoint c was trained with " in line for line in lines)


STEPS = "train.train_iters"


@pytest.mark.parametrize(
    ("train", "is_refused"),
    [
        ({"lr_decay_style": "constant"}, False),
        ({"lr_decay_style": "constant", "lr_warmup_iters": 2}, False),
        ({"lr_decay_style": "cosine"}, True),
        # Its warm-up would be longer, too.
        ({"lr_decay_style": "constant", "lr_warmup_fraction": 0.1}, True),
    ],
)
def test_more_steps_are_allowed_where_the_learning_rate_does_not_depend_on_them(train, is_refused):
    identity = recipe_identity(with_sections({"train": train}))
    lines = differences(identity | {STEPS: 8}, identity | {STEPS: 4}, "c")
    assert [line.startswith(f"{STEPS} = 8: the checkpoint c was trained with 4; with lr") for line in lines] == (
        [True] * is_refused
    )


def identity_of_rows(folder, tokenizer, *, files=((0, 1, 2), (3, 4)), weights=(1.0, 1.0), changed=None):
    """Of the rows in files that hold some of five rows each; one row may have another, equally long response."""
    folder.mkdir()
    rows = [{"prompt": f"w{i} w1", "response": f"w{i} w{i + 1}"} for i in range(5)]
    if changed is not None:
        rows[changed]["response"] = "w40 w41"
    for number, part in enumerate(files):
        (folder / f"{number}.jsonl").write_text("".join(json.dumps(rows[row]) + "\n" for row in part))
    sources = [{"path": str(folder / f"{number}.jsonl"), "weight": w} for number, w in enumerate(weights)]
    section = DataSection.model_validate({"dataset": sources, "dataset_cache_dir": str(folder / "cache")})
    dataset, _ = build_dataset(section, "train", tokenizer)
    return rows_identity(dataset, weights)


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": (2.0, 1.0)},
        {"files": ((0, 1), (2, 3, 4))},
        {"files": ((3, 4), (0, 1, 2))},
        {"changed": 3},
    ],
    ids=["weights", "other sizes", "another order", "one response"],
)
def test_other_rows_are_named(changes, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint("qwen3"))
    saved = identity_of_rows(tmp_path / "saved", tokenizer)
    assert differences(identity_of_rows(tmp_path / "moved", tokenizer), saved, "c") == []
    lines = differences(identity_of_rows(tmp_path / "changed", tokenizer, **changes), saved, "c")
    assert any(line.startswith("data.dataset (rows, weight and hash of each file) = ") for line in lines)


@pytest.mark.parametrize(("former", "present"), [("last", "last_round"), ("all", "default")])
def test_a_checkpoint_with_a_key_under_its_former_name(former, present):
    saved = {"data.loss_on": former}
    assert differences({"data.loss_scale": present}, saved, "c") == []
    (line,) = differences({"data.loss_scale": "all"}, saved, "c")
    assert line == f"data.loss_scale = all: the checkpoint c was trained with {present}"
