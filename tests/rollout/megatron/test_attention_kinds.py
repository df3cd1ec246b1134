"""The cache attends as each layer does: with windows, sinks, and scales that are not those of the configuration."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from families.text import CASES, build, write
from rollout.contract import EOS, REQUESTS, tokens_of, transformers_greedy

from megatron_gkd.errors import UserError

TP2 = {"tensor": 2}
SP = {"sequence_parallel": True}
PP2 = {"pipeline": 2}
FEW = {"max_batch_tokens": 60}
"""Room for two rows: the others start when these have ended."""
DENSE = {"one process, two rows at a time": (1, {}, FEW), "TP2xPP2": (4, TP2 | PP2, {})}
MIXTURE = {"one process, two rows at a time": (1, {}, FEW), "TP2+SPxEP2": (2, TP2 | SP | {"expert": 2}, {})}
KINDS = {
    "qwen2, windows": DENSE,
    "mistral, windows": {"CP2": (2, {"context": 2}, {})},
    "gpt_oss": MIXTURE,
    "deepseek_v3, yarn": MIXTURE,
}


@functools.cache
def checkpoint(name):
    (case,) = (case for case in CASES if case.name == name)
    return write(case, build(case))


def greedy(rank, world_size, path, layout, limits, dtype=torch.float32):
    """Return the completions, and the log-probabilities that one forward pass of a whole row gives their tokens."""
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel
    from megatron_gkd.rollout.megatron.engine import MegatronEngine
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh

    mesh = initialize_mesh(Layout(**layout), seed=1)
    model = MegatronModel.load(Checkpoint.open(str(path)), mesh, BuildOptions(dtype=dtype, attn="sdpa"))
    request = REQUESTS["greedy"]
    completions = MegatronEngine(model, [EOS], **limits).generate(request.prompts, request.sampling, request.seeds)
    log_probs = None
    if world_size == 1:
        rows = zip(request.prompts, completions, strict=True)
        log_probs = [log_probs_of_whole_row(model, prompt, completion.token_ids) for prompt, completion in rows]
    destroy_mesh()
    return completions, log_probs


@torch.no_grad()
def log_probs_of_whole_row(model, prompt, token_ids):
    from megatron_gkd.data.microbatch import collate
    from megatron_gkd.data.sample import Sample
    from megatron_gkd.models.megatron_model import hidden_states, in_eval_mode

    ids = torch.tensor(prompt + token_ids)
    row = collate([Sample(ids.numpy(), ids.numpy(), "dataset", 0)], pad_multiple=1, pad_token_id=0)
    with in_eval_mode(model.chunks):
        hidden = hidden_states(model.chunks[0], row).squeeze(0)[len(prompt) - 1 : -1]
    logits = (hidden @ model.head_weight.T)[:, : model.checkpoint.vocab_size]
    return logits.log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])[:, 0].tolist()


@pytest.mark.parametrize(("name", "engine"), [(name, engine) for name, engines in KINDS.items() for engine in engines])
def test_greedy_tokens_are_those_of_transformers(name, engine, gloo_world):
    world_size, layout, limits = KINDS[name][engine]
    path = checkpoint(name)
    expected = transformers_greedy(path, REQUESTS["greedy"].prompts, 16)
    for completions, _ in gloo_world(world_size).run(greedy, path, layout, limits):
        assert tokens_of(completions) == expected


@pytest.mark.parametrize("name", KINDS)
def test_decoding_equals_one_forward_pass_of_the_whole_row(name, gloo_world):
    ((completions, log_probs),) = gloo_world(1).run(greedy, checkpoint(name), {}, FEW, torch.float64)
    tolerance = 1e-9 if KINDS[name] is not MIXTURE else 1e-6  # routers compute in fp32
    for completion, expected in zip(completions, log_probs, strict=True):
        assert completion.log_probs == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(("layer_number", "window"), [(1, 4), (2, None)])
def test_the_window_of_transformer_engines_attention_is_the_configurations(layer_number, window):
    import megatron_gkd.runtime.preload  # noqa: F401
    from megatron_gkd.runtime.transformer_engine.attention import causal_attention_of

    config = SimpleNamespace(window_size=(3, 0), window_attn_skip_freq=[1, 0, 1, 0])
    core = SimpleNamespace(config=config, layer_number=layer_number, softmax_scale=0.5)
    attention = causal_attention_of(core)
    assert (attention.scale, attention.window, attention.sinks) == (0.5, window, None)


def refusals(rank, world_size, path):
    """Return what building says under context parallelism, and the engine without."""
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel
    from megatron_gkd.rollout.megatron.engine import MegatronEngine
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh

    checkpoint, found = Checkpoint.open(str(path)), []
    for layout, opens in ({"context": 2}, False), ({"pipeline": 2}, True):
        mesh = initialize_mesh(Layout(**layout), seed=1)
        try:
            model = MegatronModel.load(checkpoint, mesh, BuildOptions())
            assert opens
            MegatronEngine(model, [EOS])
        except UserError as error:
            found.append(str(error))
        destroy_mesh()
    return found


def test_delta_nets_are_refused_before_anything_is_sampled(gloo_world):
    path = checkpoint("qwen3_next")
    for found in gloo_world(2).run(refusals, path):
        assert found == [
            f"parallel.context_parallel_size = 2: must be 1 with the gated delta nets of {path}, for which "
            "Megatron-Core 0.16 has no context parallelism",
            f"rollout.engine = megatron: must be vllm or vllm_server with the gated delta nets of {path}, of which "
            "the embedded engine keeps no states",
        ]
