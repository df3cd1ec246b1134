"""Servers with the weights that they were started with: only routes of an ordinary server are used."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from layouts import DENSE
from rollout.contract import CHECKPOINT, EOS, Request
from teachers.contract import mesh_of

from megatron_gkd.errors import UserError
from megatron_gkd.rollout.base import RolloutFailed, Sampling
from megatron_gkd.rollout.vllm.logit_bias import logit_bias

REQUEST = Request.of([3, 5, 2, 7], Sampling(max_completion_length=6, temperature=0.8))


class Handler(BaseHTTPRequestHandler):
    """Repeat the prompt, and add an EOS if there is room."""

    def respond(self, content):
        body = json.dumps(content).encode()
        self.send_response(200 if content else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.server.requested.add(self.path)
        responses = {"/v1/models": {"data": [{"id": "big", "max_model_len": 64}]}}
        if self.server.is_paused is not None:  # an ordinary server has no such route
            responses["/is_paused"] = {"is_paused": self.server.is_paused}
        self.respond(responses.get(self.path))

    def do_POST(self):
        self.server.requested.add(self.path)
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.biases.append(request.get("logit_bias"))
        assert request["model"] == "big" and request["temperature"] == 0.8 and EOS in request["stop_token_ids"]
        tokens = [*request["prompt"], EOS][: request["max_tokens"]]
        log_probs = {"token_logprobs": [-1.0] * len(tokens)}
        reason = "stop" if tokens[-1] == EOS else "length"
        choice = {"token_ids": tokens, "finish_reason": reason, "logprobs": log_probs, "text": ""}
        self.respond({"choices": [choice]})

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requested, server.is_paused, server.biases = set(), None, []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def completions_of(rank, world_size, layout, url, max_length, vocab_size=None):
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.rollout.vllm.own_weights import OwnWeightsEngine
    from megatron_gkd.rollout.vllm.server_options import RolloutServerOptions

    with mesh_of(layout) as mesh:
        options = RolloutServerOptions((url,), Path("unused"), max_length=max_length, max_downtime=1)
        engine = OwnWeightsEngine(mesh, Checkpoint.open(str(CHECKPOINT())), options)
        engine.load_weights(iter(()), version=0)
        sampling = replace(REQUEST.sampling, vocab_size=vocab_size)
        return engine.generate(REQUEST.prompts, sampling, REQUEST.seeds)


def test_every_rank_of_a_replica_gets_the_completions(gloo_world, server):
    world_size, layout = DENSE["TP2xPP2"]
    ranks = gloo_world(world_size).run(completions_of, layout, server.url, 64)
    for completions in ranks:
        assert [one.token_ids for one in completions] == [[*prompt, EOS][:6] for prompt in REQUEST.prompts]
        assert [one.finish_reason for one in completions] == ["stop", "stop", "stop", "length"]
    assert server.requested == {"/v1/models", "/is_paused", "/v1/completions"} and not any(server.biases)


def test_ids_that_may_not_be_drawn_are_named_to_the_server(gloo_world, server):
    gloo_world(1).run(completions_of, {}, server.url, 64, 97)
    assert server.biases == [{"97": -100.0, "98": -100.0}] * len(REQUEST.prompts)


def test_more_ids_than_vllm_has_room_for_are_refused():
    assert logit_bias(Sampling(4), 99) is None and logit_bias(Sampling(4, vocab_size=99), 99) is None
    assert len(logit_bias(Sampling(4, vocab_size=10), 1034)) == 1024
    message = "has 1035 ids, and student and teacher share 10; vLLM can exclude at most 1024 ids. Use engine = megatron"
    with pytest.raises(UserError, match=message):
        logit_bias(Sampling(4, vocab_size=10), 1035)


def test_a_server_of_shorter_sequences_is_refused(gloo_world, server):
    with pytest.raises(RolloutFailed, match=r"up to 64 tokens, fewer than data.max_length = 65"):
        gloo_world(1).run(completions_of, {}, server.url, 65)


def test_a_server_that_is_paused_is_refused_instead_of_waited_for(gloo_world, server):
    server.is_paused = True
    with pytest.raises(RolloutFailed, match=f"{server.url}: generation is paused; resume it"):
        gloo_world(1).run(completions_of, {}, server.url, 64)
    server.is_paused = False
    assert len(gloo_world(1).run(completions_of, {}, server.url, 64)[0]) == 4
