"""Requests for completions, without a server."""

from __future__ import annotations

from rollout.vision_contract import VISION_CHECKPOINT, VisionPrompts
from vision_checkpoints import END_ID, IMAGE_ID, START_ID

from megatron_gkd.data.vision.data_uri import as_data_uri
from megatron_gkd.data.vision.processor import open_processing
from megatron_gkd.rollout.base import Sampling
from megatron_gkd.rollout.vllm.prompt import build_prompts
from megatron_gkd.rollout.vllm.requests import RequestBuilder
from megatron_gkd.runtime.servers import ServedModel


def test_a_request_has_one_placeholder_for_each_image():
    prompts, processing = VisionPrompts.of(VISION_CHECKPOINT()), open_processing(VISION_CHECKPOINT())
    builder, model = RequestBuilder(301, [2], processing), ServedModel(name="student", max_model_len=100)
    text, _, _, several, _ = build_prompts(prompts.ids, prompts.images, processing)
    request = builder.build(model, several, prompts.sampling, seed=3)
    rendered = [20, 21, START_ID, IMAGE_ID, END_ID, 22, START_ID, IMAGE_ID, END_ID, 23]
    assert request.path == "/inference/v1/generate" and request.body["token_ids"] == rendered
    assert [part["url"] for part in request.body["content_parts"]] == [
        as_data_uri(image) for image in prompts.images[3]
    ]
    assert request.body["sampling_params"]["detokenize"] is False and request.body["return_token_ids"] is True
    request = builder.build(model, text, prompts.sampling, seed=3)
    assert request.path == "/v1/completions" and request.body["prompt"] == prompts.ids[0]


def test_a_request_has_all_of_the_sampling():
    """A server would otherwise take the model's own."""
    builder, model = RequestBuilder(99, [2]), ServedModel(name="student", max_model_len=100)
    sampling = Sampling(8, temperature=0.7, top_k=5, top_p=0.8, min_p=0.05, repetition_penalty=1.2)
    body = builder.build(model, build_prompts([[5, 6]], None, None)[0], sampling, seed=3).body
    expected = {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2, "logprobs": 0}
    assert expected.items() <= body.items()
