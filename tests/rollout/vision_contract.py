"""The contract of rollout engines for prompts with images; see `rollout.contract`.

    class TestMyEngine(VisionEngineContract):
        @pytest.fixture(scope="class")
        @classmethod
        def results(cls, vision_prompts):
            return complete(MyEngine(...), vision_prompts)           # or the same in every rank of a world

The engine samples from `VISION_CHECKPOINT()` (vocabulary 301), in fp32.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from vision.vision_rows import token_types
from vision_checkpoints import END_ID, START_ID, vision_checkpoint, write_image

from megatron_gkd.data.vision.files import ImageStore
from megatron_gkd.data.vision.image import Image
from megatron_gkd.data.vision.processor import PixelLimits, open_processing
from megatron_gkd.data.vision.video_files import VideoReference, resolve_video
from megatron_gkd.rollout.base import Completion, RolloutEngine, Sampling

LENGTH = 8
LIMITS = PixelLimits(max_pixels=400)
"""Other than the checkpoint's, for the engines with vLLM: they scale two of the prompts' images."""
HEADS_FOR_VLLM = dict(num_attention_heads=2, num_key_value_heads=1)  # of 32, the smallest that vLLM has on a CPU
ROPE = dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6])


PARTS: list[list] = [
    [10, 11, 12],
    [10, (16, 24, 0), 11, 12],
    [10, (16, 24, 1), 11, 12],
    [20, 21, (32, 16, 2), 22, (16, 16, 3), 23],
    [30, 31, 32, 33, (24, 24, 4)],
]


@functools.cache
def images_folder() -> Path:
    """Return the folder of this process's images."""
    return Path(tempfile.mkdtemp(prefix="rollout-images-"))


@functools.cache
def vision_checkpoint_for_vllm(seed: int = 5) -> Path:
    """Return a qwen2_5_vl of two layers."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-vllm-qwen2_5_vl-"))
    return vision_checkpoint(folder, "qwen2_5_vl", seed, **HEADS_FOR_VLLM, rope_parameters=ROPE, num_hidden_layers=2)


VISION_CHECKPOINT = vision_checkpoint_for_vllm


@dataclass(frozen=True)
class VisionPrompts:
    """Prompts of which the second and third have the same ids, and different images of one size."""

    ids: list[list[int]]
    images: list[tuple[Image, ...]]
    sampling: Sampling

    @classmethod
    def of(cls, checkpoint: Path, limits: PixelLimits | None = None, parts: list[list] = PARTS) -> VisionPrompts:
        """Return prompts made of words' ids, and of images by height, width and seed; lists of these are videos."""
        processing = open_processing(checkpoint, limits)
        folder = images_folder()
        store = ImageStore(folder)
        ids: list[list[int]] = []
        images: list[tuple[Image, ...]] = []
        for prompt in parts:
            found, tokens = [], []
            for part in prompt:
                if isinstance(part, int):
                    tokens.append(part)
                    continue
                paths = [str(write_image(folder, *size)) for size in (part if isinstance(part, list) else [part])]
                if len(paths) > 1:
                    found.append(resolve_video(store, VideoReference(tuple(paths)), lambda *_: ()))
                else:
                    found.append(store.resolve(paths[0]))
                tokens += [START_ID, *processing.tokens(found[-1]), END_ID]
            ids.append(tokens)
            images.append(tuple(found))
        sampling = Sampling(LENGTH, temperature=0, ignore_eos=True, reserved_ids=processing.reserved_ids)
        return cls(ids, images, sampling)


def complete(engine: RolloutEngine, prompts: VisionPrompts) -> dict[str, list[Completion] | str]:
    """Return greedy completions, the same drawn, each prompt alone, and the messages for wrong prompts."""
    drawn = replace(prompts.sampling, temperature=1.0, max_completion_length=4)
    seeds = list(range(len(prompts.ids)))
    with engine.resident():
        results = {
            "greedy": engine.generate(prompts.ids, prompts.sampling, seeds, prompts.images),
            "drawn": engine.generate(prompts.ids, drawn, seeds, prompts.images),
            "alone": engine.generate(prompts.ids[3:4], prompts.sampling, [0], prompts.images[3:4]),
            "text": engine.generate(prompts.ids[:1], prompts.sampling, [0]),
        }
        for name, ids, images in (
            ("count", prompts.ids[:2], prompts.images[:1]),
            ("tokens", [prompts.ids[1]], [prompts.images[3]]),
            ("surplus", [prompts.ids[3]], [prompts.images[3][:1]]),
        ):
            try:
                engine.generate(ids, prompts.sampling, seeds[: len(ids)], images)
                results[name] = "no error"
            except ValueError as error:
                results[name] = str(error)
    return results


@functools.cache
def transformers_vision_model(path: Path):
    ROPE_INIT_FUNCTIONS.pop("default", None)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


@torch.no_grad()
def expected_completions(
    path: Path, prompts: VisionPrompts, limits: PixelLimits | None = None
) -> list[tuple[list[int], list[float]]]:
    """By transformers, without a cache: greedy tokens that are not reserved, and their log-probabilities."""
    model, processing = transformers_vision_model(path), open_processing(path, limits)
    expected = []
    for prompt, images in zip(prompts.ids, prompts.images, strict=True):
        ids, log_probs = torch.tensor(prompt), []
        pixels = processing.pixels(images)
        for _ in range(prompts.sampling.max_completion_length):
            if processing.position_rows > 1:
                pixels["mm_token_type_ids"] = token_types(ids[None])
            logits = model(input_ids=ids[None], use_cache=False, **pixels).logits[0, -1].double()
            allowed = logits.clone()
            allowed[list(prompts.sampling.reserved_ids)] = -torch.inf
            log_probs.append(logits.log_softmax(-1)[allowed.argmax()].item())
            ids = torch.cat([ids, allowed.argmax()[None]])
        expected.append((ids[len(prompt) :].tolist(), log_probs))
    return expected


def assert_completions(found: list[Completion], expected: list[tuple[list[int], list[float]]]) -> None:
    for completion, (tokens, log_probs) in zip(found, expected, strict=True):
        assert completion.token_ids == tokens
        assert completion.log_probs == pytest.approx(log_probs, abs=1e-4)


class VisionEngineContract:
    limits: PixelLimits | None = None

    @pytest.fixture(scope="class")
    @classmethod
    def results(cls) -> dict[str, list[Completion] | str]:
        raise NotImplementedError("an engine's tests define it")

    def test_greedy_tokens_and_log_probs_are_those_of_transformers(self, results):
        path = VISION_CHECKPOINT()
        expected = expected_completions(path, VisionPrompts.of(path, self.limits), self.limits)
        assert_completions(results["greedy"], expected)

    @pytest.mark.parametrize("name", ["greedy", "drawn"])
    def test_other_images_give_other_completions(self, results, name):
        prompts = VisionPrompts.of(VISION_CHECKPOINT(), self.limits)
        assert prompts.ids[1] == prompts.ids[2] and prompts.images[1] != prompts.images[2]
        assert results[name][1].log_probs != pytest.approx(results[name][2].log_probs, abs=1e-3)

    def test_a_prompt_is_completed_the_same_alone(self, results):
        assert results["alone"][0].token_ids == results["greedy"][3].token_ids
        assert results["text"][0].token_ids == results["greedy"][0].token_ids

    def test_wrong_images_are_refused(self, results):
        assert results["count"] == "2 prompts and images of 1: each prompt needs its images, or none"
        assert "of 2 has no tokens in the sequence" in results["tokens"]
        assert "4 tokens of images beside those of its 1 images" in results["surplus"]
