"""A rollout server that takes a known time for each completion, and no processor: as one on another machine."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import numpy as np


class SleepingServer:
    """Responds as vLLM does, without a model. Requests wait side by side.

    Args:
        vocab_size: completions have ids below it.
        completion_length: tokens of each.

    Attributes:
        seconds: that a completion takes.
    """

    def __init__(self, vocab_size: int, completion_length: int) -> None:
        self.vocab_size, self.completion_length = vocab_size, completion_length
        self.seconds = 0.0
        self._label = "default"

    def transport(self) -> httpx.MockTransport:
        """Return a transport to this server."""
        return httpx.MockTransport(self._respond)

    def _respond(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else {}
        name = request.url.path.rpartition("/")[2]
        if name == "update_weight_version":
            self._label = body["new_version"]
        responses = {
            "models": {"data": [{"id": "sleeping", "max_model_len": 4096}]},
            "server_info": {"vllm_config": {"model_config": {"logprobs_mode": "raw_logprobs"}}},
            "weight_info": {"weight_version": self._label},
            "reset_prefix_cache": {"success": True},
        }
        return httpx.Response(200, json=self._complete(body) if name == "completions" else responses.get(name, {}))

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        time.sleep(self.seconds)
        tokens = np.random.default_rng(body["seed"]).integers(4, self.vocab_size, self.completion_length).tolist()
        log_probs = {"token_logprobs": [-1.0] * len(tokens)}
        return {"choices": [{"finish_reason": "stop", "token_ids": tokens, "logprobs": log_probs}]}
