"""What the colocated engine does around vLLM, with another in its place: dealing prompts out, errors, sleep."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rollout.contract import CHECKPOINT, GREEDY
from safetensors.torch import load_file
from vision_checkpoints import write_image

from megatron_gkd.data.vision.files import ImageStore
from megatron_gkd.rollout.base import RolloutFailed
from megatron_gkd.rollout.vllm.completion_response import Sampled
from megatron_gkd.rollout.vllm.engine_arguments import ColocatedOptions


class FakeVllm:
    """Complete a prompt with its own tokens and the seed, and record the requests."""

    images = None

    def __init__(self, can_sleep=False, fails_at=None):
        self.can_sleep, self.fails_at, self.calls, self.num_tensors = can_sleep, fails_at, [], []

    def load(self, named_tensors):
        self.calls.append("load")
        self.num_tensors.append(len(list(named_tensors)))

    def generate(self, prompts, seeds, max_tokens, sampling):
        if self.fails_at in seeds:
            raise MemoryError("no room")
        prompts = [prompt.rendered_ids for prompt in prompts]
        self.calls.append([list(prompt) for prompt in prompts])
        completions = [[*prompt, seed][:most] for prompt, seed, most in zip(prompts, seeds, max_tokens, strict=True)]
        return [Sampled(tokens, [-1.0] * len(tokens), "length") for tokens in completions]

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def wake_up(self, parts):
        self.calls.append("wake " + " ".join(parts))


def open_engine(vllm, checkpoint, layout=None, **options):
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.rollout.vllm.colocated import VllmColocatedEngine
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh

    mesh = initialize_mesh(Layout(**(layout or {})), seed=1)
    options = ColocatedOptions(torch.float32, 256, **options)
    engine = VllmColocatedEngine(mesh, Checkpoint.open(str(checkpoint)), options, vllm)
    destroy_mesh()  # the engine has no group of it
    return engine


def weights_of(checkpoint):
    return load_file(checkpoint / "model.safetensors").items()


def deal(rank, world_size, checkpoint, layout, tensor_parallel_size, prompts_of):
    """Return the requests of this rank's vLLM, this rank's replica, and its completions."""
    vllm = FakeVllm()
    engine = open_engine(vllm, checkpoint, layout, tensor_parallel_size=tensor_parallel_size)
    engine.load_weights(weights_of(checkpoint), version=4)
    prompts = prompts_of[engine.replica]
    completions = engine.generate(prompts, GREEDY, [10 * engine.replica + i for i in range(len(prompts))])
    return vllm.calls[1], engine.replica, [(c.token_ids, c.version) for c in completions]


FIVE, TWO = [[50], [51], [52], [53], [54]], [[60], [61]]


@pytest.mark.parametrize(
    ("layout", "tensor_parallel_size", "prompts_of", "requested"),
    [
        ({"tensor": 2}, 1, [FIVE, TWO], [[[50], [54]], [[51], [60]], [[52], [61]], [[53]]]),
        ({"tensor": 2}, 2, [FIVE, TWO], [[[50], [52], [54], [61]], [[51], [53], [60]]]),
        ({"pipeline": 2}, 4, [FIVE, TWO], [[*FIVE, *TWO]]),
        ({"context": 2, "tensor": 2}, 2, [FIVE], [FIVE[::2], FIVE[1::2]]),
        ({"tensor": 2}, 1, [[], TWO], [TWO[:1], TWO[1:], [], []]),
        ({}, 2, [TWO, [], [], []], [TWO[:1], TWO[1:]]),
    ],
    ids=[
        "TP2xDP2",
        "TP2xDP2, two engines",
        "PP2xDP2, one engine",
        "TP2xCP2",
        "one replica has prompts",
        "DP4, two engines",
    ],
)
def test_all_engines_share_all_prompts(layout, tensor_parallel_size, prompts_of, requested, gloo_world):
    ranks = gloo_world(4).run(deal, CHECKPOINT(), layout, tensor_parallel_size, prompts_of)
    assert [calls for calls, _, _ in ranks] == [part for part in requested for _ in range(tensor_parallel_size)]
    assert {replica for _, replica, _ in ranks} == set(range(len(prompts_of)))
    for _, replica, completions in ranks:
        assert completions == [([*prompt, 10 * replica + i], 4) for i, prompt in enumerate(prompts_of[replica])]


def fail(rank, world_size, checkpoint):
    """Return the messages of three failures, each of one rank or one replica alone."""
    engine = open_engine(FakeVllm(fails_at=7), checkpoint)
    engine.load_weights(weights_of(checkpoint), version=1)
    messages = []
    for prompts in ([[5], [5]], [[5], [99]], [[5], [5] * 256]):
        prompts = prompts if rank == 1 else [[5]]
        with pytest.raises((RolloutFailed, ValueError)) as error:
            engine.generate(prompts, GREEDY, [7 + i for i in range(len(prompts))] if rank else [0])
        messages.append((type(error.value), str(error.value)))
    with pytest.raises(RolloutFailed) as error:
        engine.load_weights(list(weights_of(checkpoint))[rank:], version=2)  # the second rank misses one
    return messages, str(error.value)


def test_a_failure_anywhere_is_raised_everywhere(gloo_world):
    (first, first_weights), (second, second_weights) = gloo_world(2).run(fail, CHECKPOINT())
    assert [text.split("\n")[0] for _, text in first] == [
        "vLLM failed in rank 1:",
        "prompt 1 has the token id 99; allowed are 0 to 98",
        "prompt 1 of 256 tokens leaves no room for a completion in rollout.vllm_max_model_len = 256",
    ]
    assert first[0][1].endswith("MemoryError: no room")
    assert [text for _, text in second] == [text for _, text in first]
    assert [kind for kind, _ in second] == [RolloutFailed, ValueError, RolloutFailed]
    assert "is missing and should be" in first_weights and first_weights == second_weights


def follow(rank, world_size, checkpoint, level):
    """Return the calls in two steps, and the failures of requests before and after them."""
    vllm = FakeVllm(can_sleep=True)
    engine = open_engine(vllm, checkpoint, sleep_level=level)
    refused = []

    def try_to_generate():
        try:
            engine.generate([[5]], GREEDY, [0])
        except RolloutFailed as error:
            refused.append(str(error))

    try_to_generate()
    for step in range(2):
        engine.load_weights(weights_of(checkpoint), version=step)
        with engine.resident():
            try_to_generate()
    try_to_generate()
    with engine.resident():
        try_to_generate()
    return vllm.calls, len(refused), vllm.num_tensors


@pytest.mark.parametrize("level", [0, 1, 2])
def test_vllm_is_awake_only_from_new_weights_to_the_last_sample(level, gloo_world):
    calls, refused, num_tensors = gloo_world(1).run(follow, CHECKPOINT(), level)[0]
    step = ["load", [[5]]]
    if level == 0:
        assert calls == [*step, *step, [[5]], [[5]]] and refused == 1, "only without any weights"
        return
    sleep = f"sleep {level}"
    step = ["wake weights", "load", "wake kv_cache", [[5]], sleep]
    again = [[[5]]] if level == 1 else []  # level 2 has lost the weights
    assert calls == [sleep, *step, *step, "wake weights kv_cache", *again, sleep]
    assert refused == (2 if level == 1 else 3)
    assert len(set(num_tensors)) == 1 and num_tensors[0] == len(weights_of(CHECKPOINT()))


class TwoTokens:
    """The processing of a model with two tokens for each image."""

    placeholder_id = 9
    videos = None

    def tokens(self, image):
        return [9, 9]


def complete_where_one_rank_lacks_a_file(rank, world_size, checkpoint, directory):
    from megatron_gkd.rollout.vllm import colocated

    vllm = FakeVllm()
    vllm.images = TwoTokens()
    engine = open_engine(vllm, checkpoint, {"tensor": 2}, tensor_parallel_size=2)
    engine.load_weights(weights_of(checkpoint), version=1)
    image = ImageStore(directory).resolve(str(write_image(directory / str(rank))))
    prompts, images = [[5, 9, 9, 6]], [(replace(image, location=str(directory / "gone.png")),)]
    assert engine.generate(prompts, GREEDY, [1], [(image,)])[0].token_ids[:3] == [5, 9, 6]
    original = colocated.read_encoded
    if rank == 0:  # the file is on the other's disk
        colocated.read_encoded = lambda image: b""
    with pytest.raises(RolloutFailed, match=r"gone\.png: No such file or directory; it was there when"):
        engine.generate(prompts, GREEDY, [1], images)
    colocated.read_encoded = original
    return vllm.calls.count([[5, 9, 6]])


def test_an_image_that_one_rank_of_an_engine_cannot_read_is_an_error_before_vllm_starts(gloo_world, tmp_path):
    assert gloo_world(2).run(complete_where_one_rank_lacks_a_file, CHECKPOINT(), tmp_path) == [1, 1]
