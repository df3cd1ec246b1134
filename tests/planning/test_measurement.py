"""Measuring from configurations alone."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import transformers
from families import text, vision
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from vision_checkpoints import vision_config

from megatron_gkd.checkpoint_format.cache_manifest import FILE, Manifest
from megatron_gkd.config.schema import Recipe
from megatron_gkd.errors import UserError
from megatron_gkd.planning.costs import MeasureOptions

COMMON = dict(
    hidden_act="silu",
    head_dim=128,
    max_position_embeddings=40960,
    rms_norm_eps=1e-6,
    rope_theta=1000000,
    vocab_size=151936,
)
DENSE = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", num_key_value_heads=8, **COMMON)
MIXTURE = dict(
    architectures=["Qwen3MoeForCausalLM"],
    model_type="qwen3_moe",
    num_key_value_heads=4,
    num_experts=128,
    num_experts_per_tok=8,
    norm_topk_prob=True,
    **COMMON,
)


def shape(hidden, feed_forward, heads, layers, **more):
    sizes = dict(
        hidden_size=hidden, intermediate_size=feed_forward, num_attention_heads=heads, num_hidden_layers=layers
    )
    return sizes | {"tie_word_embeddings": False} | more


QWEN3 = {
    "1.7B": DENSE | shape(2048, 6144, 16, 28, tie_word_embeddings=True),
    "8B": DENSE | shape(4096, 12288, 32, 36),
    "32B": DENSE | shape(5120, 25600, 64, 64),
    "30B-A3B": MIXTURE | shape(2048, 6144, 32, 48, moe_intermediate_size=768),
    "235B-A22B": MIXTURE | shape(4096, 12288, 64, 94, moe_intermediate_size=1536),
}
PUBLISHED = {"1.7B": 1.7206e9, "8B": 8.191e9, "32B": 32.762e9, "30B-A3B": 30.532e9, "235B-A22B": 235.094e9}
LARGE = dict(
    tensor_model_parallel_size=4,
    pipeline_model_parallel_size=2,
    expert_model_parallel_size=32,
    sequence_parallel=True,
)


@pytest.fixture
def qwen3(tmp_path):
    """Return a function that writes the config.json of a Qwen3 model and returns its folder."""

    def write(name):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(QWEN3[name]))
        return folder

    return write


def recipe(student, teacher_model=None, /, **sections):
    tree = {
        "student": {"model": str(student)},
        "teacher": {"teacher_kind": "none"} if teacher_model is None else {"teacher_model": str(teacher_model)},
        "distill": {},
        "parallel": {},
        "data": {"dataset": ["unused.jsonl"], "max_length": 1024},
        "train": {"global_batch_size": 8, "train_iters": 1},
        "output": {"output_dir": "unused"},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return Recipe.model_validate(tree)


@pytest.mark.parametrize("name", QWEN3)
def test_parameters_of_all_ranks_are_the_published_number(name, qwen3, measured):
    if name in ("30B-A3B", "235B-A22B"):
        ranks = measured(recipe(qwen3(name), parallel=LARGE, train={"global_batch_size": 512}), 512)
        # Of each stage: the dense parameters are on 4 ranks, the experts on 32; norms and routers are on all 4.
        config = QWEN3[name]
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        experts = layers // 2 * 4 * 3 * _expert_matrix(config)
        replicated = layers * (config["num_experts"] * hidden + 2 * hidden + 2 * config["head_dim"]) + hidden
        total = sum(4 * (one.student.parameters - experts) + 32 * experts for one in ranks) - 3 * replicated
    else:
        ranks = measured(recipe(qwen3(name), parallel={"pipeline_model_parallel_size": 2}), 2)
        total = sum(one.student.parameters for one in ranks)
        if QWEN3[name]["tie_word_embeddings"]:  # both end stages have it
            total -= QWEN3[name]["vocab_size"] * QWEN3[name]["hidden_size"]
    assert total == pytest.approx(PUBLISHED[name], rel=1e-4)


def _expert_matrix(config):
    return config["hidden_size"] * config["moe_intermediate_size"]


def test_235b_to_30b_on_512_ranks(qwen3, measured):
    section = recipe(
        qwen3("30B-A3B"),
        qwen3("235B-A22B"),
        parallel=LARGE,
        train={"global_batch_size": 512},
        data={"max_length": 8192},
        teacher={"offload_teacher_model": True},
    )
    first, last = measured(section, 512, MeasureOptions(expert_imbalance=1.0))
    assert [first.rank, last.rank] == [0, 256]
    assert first.student.forward.in_flight == 2 and last.student.forward.in_flight == 1
    assert first.student.forward.peak > 2 * first.student.forward.kept
    assert first.student.gradients == 2 * first.student.weights
    # 12 bytes for each parameter, over 64 data-parallel ranks, of experts over 8.
    experts = 24 * 4 * 3 * _expert_matrix(QWEN3["30B-A3B"])
    dense = first.student.parameters - experts
    assert first.student.optimizer == pytest.approx(12 * (dense / 64 + experts / 8), rel=1e-3)
    teacher = last.teachers["teacher"]
    assert teacher.weights - teacher.weights_resident == teacher.weights_host
    assert teacher.weights_resident == 151936 // 4 * 4096 * 2  # the head, which the loss needs
    assert last.teacher_states == 8 * 8192 // 4 * 4096 * 2
    (dispatched,) = {
        one.num_bytes
        for one in first.traffic
        if (one.phase, one.link, one.operation) == ("student", "ep", "all_to_all") and one.num_bytes > 2**20
    }
    assert dispatched == 8192 // 4 * 8 * 2048 * 2  # tokens of a rank, each to 8 experts
    busy, _ = measured(section, 512, MeasureOptions(expert_imbalance=2.0))
    assert busy.student.forward.kept > 1.2 * first.student.forward.kept
    assert busy.student.forward.forward_flops > 1.2 * first.student.forward.forward_flops


def test_flops_are_six_for_each_parameter_and_token(qwen3, measured):
    """Matrix products alone, as the attention core of short sequences is small."""
    (costs,) = measured(recipe(qwen3("8B"), data={"max_length": 256}), 1)
    forward = costs.student.forward
    embedding = 151936 * 4096
    layers = 2 * (costs.student.parameters - 2 * embedding) * 256
    assert forward.forward_flops == pytest.approx(layers, rel=0.01)
    assert forward.backward_flops == pytest.approx(2 * layers, rel=0.01)
    assert forward.loss_flops == pytest.approx(3 * 2 * embedding * 256, rel=0.01)


def test_recomputing_costs_a_forward_pass_and_saves_most_of_what_is_kept(qwen3, measured):
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    (plain,), (recomputed,) = (measured(recipe(qwen3("1.7B"), parallel=one), 1) for one in ({}, full))
    before, after = plain.student.forward, recomputed.student.forward
    assert after.kept < before.kept / 8
    assert after.backward_flops == pytest.approx(before.backward_flops + before.forward_flops, rel=1e-6)


def test_stages_of_an_interleaved_pipeline(qwen3, measured):
    parallel = {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 3}
    ranks = measured(recipe(qwen3("8B"), parallel=parallel), 4)
    assert [one.student.forward.in_flight for one in ranks] == pytest.approx([5, 13 / 3, 11 / 3, 3])
    sends = [sum(t.count for t in one.traffic if t.link == "pp" and t.operation == "send") for one in ranks]
    assert sends == [8 * 5, 8 * 6, 8 * 6, 8 * 5]


def test_uneven_stages(qwen3, measured):
    parallel = {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 16}
    ranks = measured(recipe(qwen3("8B"), parallel=parallel), 2)
    assert [one.student.layers for one in ranks] == [16, 20]


def test_context_parallel_ranks_of_transformer_engine_send_keys_around_a_ring(qwen3, measured):
    (costs,) = measured(recipe(qwen3("8B"), parallel={"context_parallel_size": 2}), 2)
    sends = {one for one in costs.traffic if (one.link, one.phase) == ("cp", "student")}
    assert {one.operation for one in sends} == {"send"}
    # Keys and values of 512 tokens with 8 heads of 128, once in the forward pass and three times in backward.
    assert {(one.num_bytes, one.count) for one in sends} == {(2 * 512 * 8 * 128 * 2, 36 * 4 * 8)}


def test_optimizer_in_host_memory(qwen3, measured):
    memory = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}
    (costs,) = measured(recipe(qwen3("1.7B"), memory=memory), 1)
    parameters = costs.student.parameters
    assert costs.student.optimizer + costs.student.optimizer_host > 12 * parameters
    assert costs.student.optimizer_host == pytest.approx(16 / 2 * parameters, rel=0.1)  # with the gradients' copies


def test_smaller_optimizer_state(qwen3, measured):
    memory = {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
    (costs,) = measured(recipe(qwen3("1.7B"), memory=memory), 1)
    assert costs.student.optimizer < 8.1 * costs.student.parameters


def test_adapters_alone_have_gradients_and_optimizer_state(qwen3, measured):
    folder = qwen3("1.7B")
    (costs,) = measured(recipe(folder, folder, lora={"lora_rank": 8}), 1)
    student, teacher = costs.student, costs.teachers["teacher"]
    assert 0 < student.trainable < 0.01 * student.parameters
    assert student.gradients == pytest.approx(4 * student.trainable, rel=0.01)
    assert student.optimizer == pytest.approx(12 * student.trainable, rel=0.01)
    assert (teacher.weights, teacher.weights_host) == (0, 0)  # the student's base


def test_self_teachers_keep_their_weights_in_host_memory(qwen3, measured):
    section = recipe(qwen3("1.7B"), teacher={"teacher_kind": "self", "teacher_ema": 0.99})
    (costs,) = measured(section, 1)
    assert costs.teachers["teacher"].weights_host == 6 * costs.student.parameters  # fp32, and the student's bf16
    assert costs.teacher_states > 0


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_top_k_of_a_server(qwen3, measured, tail):
    teacher = {"teacher_kind": "server", "teacher_model_server": ["http://localhost:8000"]}
    distill = {"gkd_logits_topk": 64, "gkd_topk_tail": tail}
    (costs,) = measured(recipe(qwen3("1.7B"), teacher=teacher, distill=distill), 1)
    assert costs.teachers == {}
    assert costs.teacher_states == 8 * 1024 * (64 * 12 + 4)  # with the mass of all other tokens


def test_top_k_of_a_cache(qwen3, measured, tmp_path):
    section = recipe(qwen3("1.7B"), teacher={"teacher_kind": "cache", "teacher_cache": str(tmp_path)})
    with pytest.raises(UserError, match=r"distill\.gkd_logits_topk = null: must be set to plan with teacher\.teacher_"):
        measured(section, 1)
    (tmp_path / FILE).write_text(Manifest(8, 1.0, "", "teacher", 151936).text())
    (costs,) = measured(section, 1)
    assert costs.teacher_states == 8 * 1024 * (8 * 12 + 4)


FAMILIES = {
    "qwen3, windows": "CP2",
    "deepseek_v3": "EP2",
    "qwen3_next": "TP2+SP",
    "glm4_moe": "PP2",
    "gpt_oss": "TP2+SP+EP2",
    "qwen3_vl_moe": "EP2",
    "internvl": "TP2",
}
PARALLEL = {
    "TP2": {"tensor_model_parallel_size": 2},
    "TP2+SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2},
    "CP2": {"context_parallel_size": 2},
    "EP2": {"expert_model_parallel_size": 2},
}
PARALLEL["TP2+SP+EP2"] = PARALLEL["TP2+SP"] | PARALLEL["EP2"]


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, tmp_path, measured):
    cases = {case.name: case for case in (*text.CASES, *vision.CASES)}
    config = config_of(cases[name])
    config.save_pretrained(tmp_path)
    layout = FAMILIES[name]
    assert layout in cases[name].layouts
    section = recipe(tmp_path, tmp_path, parallel=PARALLEL[layout], data={"max_length": 64})
    costs = measured(section, 2)[-1]
    assert costs.student.forward.kept > 0 < costs.teachers["teacher"].forward.peak
    assert any("vision tower" in note for note in costs.notes) == isinstance(cases[name], vision.VisionCase)


def config_of(case):
    if isinstance(case, vision.VisionCase):
        config = vision_config(case.name)
        config.architectures = [MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[config.model_type]]
        return config
    config = getattr(transformers, f"{case.hf_class}Config")(**{**text.SIZES, **text.rope(), **case.values})
    config.architectures = [f"{case.hf_class}ForCausalLM"]
    return config


def test_models_that_are_not_there(qwen3, measured, tmp_path):
    with pytest.raises(UserError, match=r"no local directory, and its config\.json can't be downloaded"):
        measured(recipe(tmp_path / "missing"), 1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps(QWEN3["8B"] | {"architectures": ["BertModel"]}))
    with pytest.raises(UserError, match="its architecture"):
        measured(recipe(tmp_path / "other"), 1)


def test_sizes_are_linear_in_the_microbatch(qwen3, measured):
    options = MeasureOptions(microbatch_tokens=1024)
    (one,), (two,) = (
        measured(recipe(qwen3("1.7B")), 1, replace(options, microbatch_tokens=tokens)) for tokens in (1024, 2048)
    )
    assert two.student.forward.microbatches == one.student.forward.microbatches // 2
    assert two.student.forward.kept == pytest.approx(2 * one.student.forward.kept, rel=0.01)
