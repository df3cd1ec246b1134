"""vLLM's routes that score a prompt: one for tokens alone, another for tokens and images."""

from __future__ import annotations

from typing import Any

from megatron_gkd.data.vision.vllm_request import GENERATE, build_generation_body
from megatron_gkd.errors import UserError
from megatron_gkd.runtime.servers import RouteMissing, Server
from megatron_gkd.teachers.server.response import COMPLETIONS_DECODER, GENERATION_DECODER, PromptScores, ScoreRequest

COMPLETIONS = "/v1/completions"


def route_of(request: ScoreRequest) -> str:
    """Return the path that scores the request."""
    return GENERATE if request.images else COMPLETIONS


def request_scores(server: Server, model: str, request: ScoreRequest, k: int) -> PromptScores:
    """Let a server score the request.

    Args:
        server: any of the teacher's.
        model: the name of its model.
        request: tokens, positions and images.
        k: tokens of each distribution.

    Raises:
        ServerDown: it may succeed later.
        UserError: the server refuses it, or an image can't be read.
    """
    sampling: dict[str, Any] = {
        "prompt_logprobs": k,
        "max_tokens": 1,  # 0 is refused
        "temperature": 0.0,  # of the sampled token; log-probabilities are always those at 1
    }
    try:
        if request.images:
            return _score_images(server, model, request, sampling)
        body = {"model": model, "prompt": request.token_ids.tolist(), "return_token_ids": True, **sampling}
        return server.request("POST", COMPLETIONS, COMPLETIONS_DECODER, json=body).choices[0]
    except UserError as error:
        hint = f"; for {k} tokens (distill.gkd_logits_topk) start it with --max-logprobs {k}"
        raise UserError(f"{error}{hint if 'max allowed' in str(error) else ''}") from error


def _score_images(server: Server, model: str, request: ScoreRequest, sampling: dict[str, Any]) -> PromptScores:
    rendered_ids = request.token_ids if request.rendered_ids is None else request.rendered_ids
    body = build_generation_body(model, rendered_ids.tolist(), request.images, sampling | {"detokenize": False})
    try:
        return server.request("POST", GENERATE, GENERATION_DECODER, json=body)
    except RouteMissing as error:
        raise UserError(
            f"{server.url}: has no route for rows with images; start it with --enable-scale-out (vLLM 0.32 or later)"
        ) from error
