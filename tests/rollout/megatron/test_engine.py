"""The embedded engine: the contract under every layout, every family, and what it leaves behind."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from checkpoints import tiny_checkpoint
from rollout.contract import (
    CHECKPOINT,
    EOS,
    GREEDY,
    REQUESTS,
    Request,
    RolloutEngineContract,
    run_requests,
    tokens_of,
    transformers_greedy,
    transformers_model,
)

TP2 = {"tensor": 2}
SP = {"sequence_parallel": True}
PP2 = {"pipeline": 2}
VPP2 = PP2 | {"virtual_pipeline": 2}
CP2 = {"context": 2}
EP2 = {"expert": 2}
FEW = {"max_batch_tokens": 200, "max_prompt_tokens": 20}
"""Room for seven or eight rows, and for few new ones at a time: most have to wait, and rows end at different times."""
TWO = {"max_batch_tokens": 60}
"""Room for two rows."""
ENGINES = {
    "one process": (1, {}, {}),
    "one process, few rows at a time": (1, {}, FEW),
    "TP2+SP": (2, TP2 | SP, {}),
    "PP2": (2, PP2, {}),
    "CP2": (2, CP2, {}),
}
DENSE_ENGINES = {
    "one process": (1, {}, {}),
    "TP2": (2, TP2, {}),
    "PP2xVPP2, two rows at a time": (2, VPP2, TWO),
}
LARGE_ENGINES = DENSE_ENGINES | {
    "TP2xPP2": (4, TP2 | PP2, {}),
    "PP2xVPP2xCP2": (4, VPP2 | CP2, {}),
}
MOE_ENGINES = {
    "one process": (1, {}, {}),
    "EP2": (2, EP2, {}),
    "TP2+SP, two rows at a time": (2, TP2 | SP, TWO),
    "TP2+SPxEP2": (2, TP2 | SP | EP2, {}),
    "CP2xEP2": (2, CP2 | EP2, TWO),
    "PP2xEP2": (4, PP2 | EP2, {}),
}


def open_engine(checkpoint, layout, limits):
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel
    from megatron_gkd.rollout.megatron.engine import MegatronEngine
    from megatron_gkd.runtime.mesh import Layout, initialize_mesh

    mesh = initialize_mesh(Layout(**layout), seed=1)
    options = BuildOptions(virtual_pipeline=layout.get("virtual_pipeline"))
    return MegatronEngine(MegatronModel.load(Checkpoint.open(str(checkpoint)), mesh, options), [EOS], **limits)


def results_of(rank, world_size, layout, limits):
    from megatron_gkd.runtime.mesh import destroy_mesh

    results = run_requests(open_engine(CHECKPOINT(), layout, limits))
    destroy_mesh()
    return results


def completions_of(rank, world_size, checkpoint, layout, limits, requests):
    """Return the completions of this data-parallel replica's own list of requests."""
    from megatron_gkd.runtime.mesh import destroy_mesh

    engine = open_engine(checkpoint, layout, limits)
    own = requests[engine.mesh.dp.rank() % len(requests)]
    completions = [engine.generate(request.prompts, request.sampling, request.seeds) for request in own]
    destroy_mesh()
    return completions


class TestMegatronEngine(RolloutEngineContract):
    @pytest.fixture(scope="class", params=ENGINES)
    @classmethod
    def results(cls, request, gloo_world, one_process):
        if request.param == "one process":
            return one_process
        world_size, layout, limits = ENGINES[request.param]
        first, *others = gloo_world(world_size).run(results_of, layout, limits)
        assert all(other == first for other in others), "every rank has the same completions"
        return first

    def test_the_layout_does_not_change_what_is_drawn(self, results, one_process):
        for name in REQUESTS:
            assert tokens_of(results[name]) == tokens_of(one_process[name]), name

    @pytest.fixture(scope="class")
    @classmethod
    def one_process(cls, gloo_world):
        return gloo_world(1).run(results_of, {}, {})[0]

    def test_log_probs_are_over_the_ids_that_may_be_drawn(self, results):
        for prompt, completion in zip(REQUESTS["few ids"].prompts, results["few ids"], strict=True):
            ids = torch.tensor([prompt + completion.token_ids])
            with torch.no_grad():
                logits = transformers_model(CHECKPOINT())(ids).logits[0, len(prompt) - 1 : -1, :40].double()
            expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0].tolist()
            assert completion.log_probs == pytest.approx(expected, abs=1e-4)


FAMILIES = {
    "llama": DENSE_ENGINES,
    "qwen2": DENSE_ENGINES,
    "qwen2_tied": DENSE_ENGINES,
    "qwen3": LARGE_ENGINES,
    "qwen3_tied": LARGE_ENGINES,
    "qwen3_moe": MOE_ENGINES,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_draws_what_transformers_draws(family, gloo_world):
    checkpoint = tiny_checkpoint(family, seed=5)
    drawn = REQUESTS["drawn in another batch"]
    expected = None
    for name, (world_size, layout, limits) in FAMILIES[family].items():
        results = gloo_world(world_size).run(
            completions_of, checkpoint, layout, limits, [[REQUESTS["greedy"], drawn]], timeout=120
        )
        for greedy, by_seed in results:
            assert tokens_of(greedy) == transformers_greedy(checkpoint, REQUESTS["greedy"].prompts, 16), name
            expected = expected or tokens_of(by_seed)
            assert tokens_of(by_seed) == expected, name


@pytest.mark.parametrize("layout", [EP2, TP2 | SP | EP2], ids=["EP2", "TP2+SPxEP2xDP2"])
def test_replicas_that_share_experts_may_have_prompts_of_their_own_or_none(layout, gloo_world):
    checkpoint = tiny_checkpoint("qwen3_moe", seed=5)
    many = [REQUESTS["greedy"], Request.of([], GREEDY), Request.of([4], replace(GREEDY, max_completion_length=3))]
    few = [Request.of([], GREEDY), Request.of([3, 2], GREEDY), Request.of([8], GREEDY)]
    world_size = 2 * layout.get("tensor", 1)
    results = gloo_world(world_size).run(completions_of, checkpoint, layout, TWO, [many, few], timeout=120)
    for rank, completions in enumerate(results):
        for request, found in zip((many, few)[rank * 2 // world_size], completions, strict=True):
            length = request.sampling.max_completion_length
            assert tokens_of(found) == transformers_greedy(checkpoint, request.prompts, length)


def generate_wrongly(rank, world_size):
    """Return the state of the model after a `generate` that fails half-way, and the completions of the next one."""
    from megatron_gkd.rollout.megatron.engine import MegatronEngine
    from megatron_gkd.runtime.mesh import destroy_mesh

    engine = open_engine(CHECKPOINT(), {}, {})
    layers = engine.model.chunks[0].decoder.layers
    engine.model.chunks[0].train()
    layers[0].mlp.eval()

    class Broken(MegatronEngine):
        def _append_tokens(self, batches, *arguments):
            super()._append_tokens(batches, *arguments)
            if len(batches[0].sequences[0].token_ids) == 3:
                raise KeyError("half-way")

    request = REQUESTS["greedy"]
    with pytest.raises(KeyError):
        Broken(engine.model, [EOS]).generate(request.prompts, request.sampling, request.seeds)
    assert MegatronEngine(engine.model, [EOS], max_batch_tokens=8).generate([], request.sampling, []) == []
    found = {
        "modes": [layer.mlp.training for layer in layers] + [layer.self_attention.training for layer in layers],
        "attention": [vars(layer.self_attention.core_attention).keys() & {"forward"} for layer in layers],
        "completions": tokens_of(engine.generate(request.prompts, request.sampling, request.seeds)),
    }
    destroy_mesh()
    return found


def test_an_error_restores_the_model(gloo_world):
    found = gloo_world(1).run(generate_wrongly)[0]
    assert found["modes"] == [False] + 7 * [True]
    assert found["attention"] == 4 * [set()]
    assert found["completions"] == transformers_greedy(CHECKPOINT(), REQUESTS["greedy"].prompts, 16)


def generate_in_parts(rank, world_size, layout, limits):
    """Return tokens and log-probabilities of the completions under each limit of what is generated at once."""
    from megatron_gkd.runtime.mesh import destroy_mesh

    request, found = REQUESTS["drawn in another batch"], []
    engine = open_engine(CHECKPOINT(), layout, {})
    for engine.max_batch_tokens in limits:
        completions = engine.generate(request.prompts, request.sampling, request.seeds)
        found.append((tokens_of(completions), [value for one in completions for value in one.log_probs]))
    destroy_mesh()
    return found


@pytest.mark.parametrize(("world_size", "layout"), [(1, {}), (2, {"pipeline": 2})], ids=["one process", "PP2"])
def test_a_step_with_more_than_max_batch_tokens_is_generated_in_parts(gloo_world, world_size, layout):
    """A sequence that exceeds the limit by itself is generated alone; the same tokens are drawn."""
    for (tokens, log_probs), *parts in gloo_world(world_size).run(generate_in_parts, layout, (65536, 100, 50, 1)):
        assert len(tokens) > 3
        for part, part_log_probs in parts:
            assert part == tokens and part_log_probs == pytest.approx(log_probs, abs=1e-5)


def train(rank, world_size, checkpoint, changes, on_the_way):
    """Two training steps. `on_the_way`: sample before each and at the end, and export at the end."""
    from training_layouts import build, named_gradients

    from megatron_gkd.models.export import export_checkpoint
    from megatron_gkd.rollout.megatron.engine import MegatronEngine
    from megatron_gkd.runtime.mesh import destroy_mesh

    _, student, _, batches = build(checkpoint, None, changes | {"teacher": {"teacher_kind": "none"}})
    engine = MegatronEngine(student.model, [EOS])
    request = REQUESTS["drawn in another batch"]

    def generate():
        student.gather_parameters()
        return tokens_of(engine.generate(request.prompts, request.sampling, request.seeds))

    records, completions = [], []
    for _, microbatches in zip(range(2), batches, strict=False):
        if on_the_way:
            completions.append(generate())
        totals = student.compute_gradients(microbatches, [None] * len(microbatches), force_all_reduce=True)
        gradient = named_gradients(student)
        records.append({"totals": totals, "gradient": gradient, "grad_norm": student.update()})
    if on_the_way:
        completions.append(generate())
        export_checkpoint(student.model, on_the_way)
    destroy_mesh()
    return records, completions


TRAINED = {
    "one process": (1, "qwen3", {}),
    "TP2+SP, full recomputation": (
        2,
        "qwen3_tied",
        {
            "parallel": {
                "tensor_model_parallel_size": 2,
                "sequence_parallel": True,
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            }
        },
    ),
    "PP2xVPP2": (2, "llama", {"parallel": {f"{kind}pipeline_model_parallel_size": 2 for kind in ("", "virtual_")}}),
    "EP2": (2, "qwen3_moe", {"parallel": {"expert_model_parallel_size": 2}}),
    "DP2, overlapped": (2, "qwen3", {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}}),
}


@pytest.mark.parametrize("layout", TRAINED)
def test_training_goes_on_as_if_nothing_had_been_sampled(layout, gloo_world, tmp_path):
    """The same losses and gradients to the last bit, and what is sampled in between is the trained model's."""
    world_size, family, changes = TRAINED[layout]
    checkpoint = tiny_checkpoint(family, seed=5)
    run = functools.partial(gloo_world(world_size).run, train, checkpoint, changes)
    undisturbed, _ = run(None)[0]
    records, completions = run(tmp_path / "export")[0]
    for expected, found in zip(undisturbed, records, strict=True):
        assert found["totals"] == expected["totals"] and found["grad_norm"] == expected["grad_norm"] > 0
        for name, gradient in expected["gradient"].items():
            assert torch.equal(found["gradient"][name], gradient), name
    before, *_, after = completions
    assert before != after
    of_export = gloo_world(1).run(completions_of, tmp_path / "export", {}, {}, [[REQUESTS["drawn in another batch"]]])
    assert after == tokens_of(of_export[0][0])
