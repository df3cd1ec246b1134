"""Fake vLLM servers without a model, for tests of what servers do rarely, or not on demand.

Completions are a function of weights, prompt and seed: other weights give other tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import httpx
import torch
from safetensors.torch import load_file

from megatron_gkd.rollout.vllm import gloo
from megatron_gkd.runtime.background import parallel_map

COMPLETION_LENGTH = 6


class FakeVllm:
    """A server. `before(path)` may raise in place of a response, or wait."""

    def __init__(self, before: Callable[[str], None] = lambda path: None, world_size: int = 1):
        self.before, self.world_size = before, world_size
        self.calls: list[str] = []
        self.restart()

    def restart(self) -> None:
        self.label, self.weights, self.arrived = "default", {}, {}
        self._is_updating, self._groups = False, []
        self.paused = False

    def respond(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        self.calls.append(path)
        self.before(path)
        body = json.loads(request.content) if request.content else {}
        try:
            response = getattr(self, path.rpartition("/")[2], dict)(**body)
        except RuntimeError as error:
            return httpx.Response(500, text=str(error))
        return httpx.Response(200, json=response or {})

    def models(self):
        return {"data": [{"id": "fake", "max_model_len": 4096}]}

    def server_info(self):
        backend = {"backend": "gloo"}
        return {"vllm_config": {"model_config": {"logprobs_mode": "raw_logprobs"}, "weight_transfer_config": backend}}

    def pause(self):
        self.paused = True

    def resume(self):
        self.paused = False

    def weight_info(self):
        return {"weight_version": self.label}

    def update_weight_version(self, new_version):
        self.label = new_version

    def reset_prefix_cache(self):
        return {"success": True}

    def get_world_size(self):
        return {"world_size": self.world_size}

    def collective_rpc(self, method, kwargs):
        files = Path(kwargs["weights_path"]).glob("*.safetensors")
        self.weights = {name: tensor for file in files for name, tensor in load_file(file).items()}

    def init_weight_transfer_engine(self, init_info):
        address, size = (init_info["master_address"], init_info["master_port"]), init_info["world_size"]

        def join(worker):
            store = gloo.join_store(*address, init_info["timeout"])
            return gloo.gloo_group(store, init_info["rank_offset"] + worker, size, address[0], init_info["timeout"])

        self._groups = parallel_map(join, range(self.world_size))

    def start_weight_update(self):
        if self._is_updating:
            raise RuntimeError("start_weight_update called while a weight update is already active")
        self._is_updating = True  # as in vLLM, the tensors of an update that failed are still there

    def update_weights(self, update_info):
        if not self._is_updating:
            raise RuntimeError("start_weight_update must be called before update_weights")
        dtypes = [getattr(torch, name) for name in update_info["dtype_names"]]
        sizes = [math.prod(s) * d.itemsize for s, d in zip(update_info["shapes"], dtypes, strict=True)]
        buffers = [torch.empty(sum(sizes), dtype=torch.uint8) for _ in self._groups]
        try:
            for work in [group.broadcast(b, 0) for group, b in zip(self._groups, buffers, strict=True)]:
                work.wait()
        except RuntimeError:
            self._is_updating = False
            raise
        assert all(buffer.equal(buffers[0]) for buffer in buffers)
        parts = zip(update_info["names"], buffers[0].split(sizes), dtypes, update_info["shapes"], strict=True)
        for name, part, dtype, shape in parts:
            if name in self.arrived:
                raise RuntimeError(f"{name} came twice")
            self.arrived[name] = part.view(dtype).view(shape)

    def finish_weight_update(self):
        if not self._is_updating:
            raise RuntimeError("finish_weight_update called without a matching start_weight_update")
        self.weights |= self.arrived
        self._is_updating, self.arrived = False, {}

    def completions(self, *, prompt, seed, stop_token_ids, **_):
        if self.paused:
            raise httpx.ReadTimeout("paused: the request waits")
        stamp = int(sum(float(w.double().abs().sum()) for w in self.weights.values()) * 1e6)
        generator = torch.Generator().manual_seed((stamp + seed) % 2**62)
        tokens = torch.randint(4, 64, (COMPLETION_LENGTH - 1,), generator=generator).tolist() + stop_token_ids[:1]
        log_probs = {"token_logprobs": [-1.0] * len(tokens)}
        return {"choices": [{"finish_reason": "stop", "token_ids": tokens, "logprobs": log_probs}]}


def transport(servers: dict[str, FakeVllm]) -> httpx.MockTransport:
    """Return a transport to the servers, by host."""
    return httpx.MockTransport(lambda request: servers[request.url.host].respond(request))
