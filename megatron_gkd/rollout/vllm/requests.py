"""Requests for one completion: by /v1/completions, and by another route where the prompt has images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_gkd.data.vision.processing import ImageProcessing
from megatron_gkd.data.vision.vllm_request import GENERATE, build_generation_body
from megatron_gkd.rollout.base import Sampling
from megatron_gkd.rollout.vllm.logit_bias import logit_bias
from megatron_gkd.rollout.vllm.prompt import VllmPrompt
from megatron_gkd.runtime.servers import ServedModel

COMPLETIONS = "/v1/completions"
GENERATE_HINT = "prompts have images, for which start it with --enable-scale-out (known from vLLM 0.32)"


@dataclass(frozen=True)
class CompletionRequest:
    """A request for one completion.

    Attributes:
        path: of the route.
        body: the JSON that is sent.
        max_tokens: most tokens of the completion.
        prompt: with images, whose tokens the server's must equal; None for text.
        processing: made the tokens of the images.
    """

    path: str
    body: dict[str, Any] = field(repr=False)
    max_tokens: int
    prompt: VllmPrompt | None = None
    processing: ImageProcessing | None = None


@dataclass(frozen=True)
class RequestBuilder:
    """Build the requests of one engine.

    Attributes:
        vocab_size: ids of the student.
        eos_token_ids: end a completion; the student's checkpoint has them, which the server's may not have.
        processing: what the student's processor makes of images; None for a text model.
    """

    vocab_size: int
    eos_token_ids: Sequence[int]
    processing: ImageProcessing | None = None

    def build(self, model: ServedModel, prompt: VllmPrompt, sampling: Sampling, seed: int) -> CompletionRequest:
        """Build the request for a prompt.

        Raises:
            UserError: an image can't be read; or more ids are excluded than vLLM has room for.
        """
        room = model.max_model_len - len(prompt.token_ids)
        max_tokens = min(sampling.max_completion_length, room)
        parameters = self._parameters(sampling, seed) | {"max_tokens": max_tokens}
        if not prompt.images:
            body = {"model": model.name, "prompt": list(prompt.token_ids), "return_token_ids": True, **parameters}
            return CompletionRequest(COMPLETIONS, body, max_tokens)
        parameters |= {"detokenize": bool(sampling.stop)}
        body = build_generation_body(model.name, prompt.rendered_ids, prompt.images, parameters)
        return CompletionRequest(GENERATE, body, max_tokens, prompt, self.processing)

    def _parameters(self, sampling: Sampling, seed: int) -> dict[str, Any]:
        """Return all parameters that a server would otherwise take from the model's generation_config.json."""
        eos = () if sampling.ignore_eos else self.eos_token_ids
        bias = logit_bias(sampling, self.vocab_size)
        return {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or 0,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": seed % 2**63,  # vLLM takes -1 for none
            "ignore_eos": True,
            "stop_token_ids": sorted({*sampling.stop_token_ids, *eos}),
            "stop": list(sampling.stop),
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,  # a stop string may be of such tokens
            "logprobs": 0,  # of the sampled token alone
        } | ({} if bias is None else {"logit_bias": bias})
