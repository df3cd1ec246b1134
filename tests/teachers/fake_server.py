"""A server that answers like a teacher's vLLM, in a thread of the test process, and fails on demand."""

from __future__ import annotations

import json
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
from teachers.contract import transformers_model
from teachers.vision_rows import vision_logits, vision_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_gkd.data.vision.expansion import replace_tokens
from megatron_gkd.data.vision.files import ImageStore
from megatron_gkd.data.vision.image import Image
from megatron_gkd.data.vision.processing import ImageProcessing


class FakeServer:
    """Of a checkpoint, in fp32 by transformers. Usable in a `with` statement, which it runs in.

    Attributes:
        max_model_len, max_logprobs, enable_scale_out: as vLLM's options.
        processing: what a multimodal checkpoint's processor makes of images; None for a text model.
        delays: seconds that the next completions take beside the time they need.
        api_key: that requests must carry; None: none.
        spoil: changes the answer to a completion (a dict) in place, or returns what is sent instead.
        asked: the paths of all requests that were answered, in order.
    """

    def __init__(
        self,
        checkpoint: Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        processing: ImageProcessing | None = None,
    ):
        self.checkpoint, self.processing, self.enable_scale_out = checkpoint, processing, True
        self.tokenizer = tokenizer or AutoTokenizer.from_pretrained(checkpoint)
        self.max_model_len, self.max_logprobs = 257, 64
        self.delays: list[float] = []
        self.spoil: Callable[[dict], bytes | None] | None = None
        self.api_key: str | None = None
        self.asked: list[str] = []
        self._port = 0
        self._lock = threading.Lock()
        self._http: _Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def completions(self) -> int:
        return self.asked.count("/v1/completions")

    @property
    def generations(self) -> int:
        return self.asked.count("/inference/v1/generate")

    def __enter__(self) -> FakeServer:
        self.start()
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    def start(self, port: int | None = None) -> None:
        """At a port, or the address that it had before, if it ran."""
        self._port = port or self._port
        self._http = _Server(("127.0.0.1", self._port), self)
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        """It refuses connections, and those that there are end without an answer."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http.cut()
            self._http = None

    def answer(self, path: str, body: dict) -> tuple[int, dict | bytes]:
        with self._lock:
            delay = self.delays.pop(0) if path == "/v1/completions" and self.delays else 0
        time.sleep(delay)
        with self._lock:
            self.asked.append(path)
            match path:
                case "/v1/models":
                    return 200, {"data": [{"id": "teacher", "max_model_len": self.max_model_len}]}
                case "/tokenize":
                    ids = self.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
                    return 200, {"tokens": ids, "token_strs": self.tokenizer.convert_ids_to_tokens(ids)}
                case "/detokenize":
                    return 200, {"prompt": self.tokenizer.decode(body["tokens"])}
                case "/v1/completions":
                    return self._complete(body)
                case "/inference/v1/generate":
                    return self._generate(body)
        return 404, {"detail": "Not Found"}

    def _complete(self, body: dict) -> tuple[int, dict | bytes]:
        k, ids = body["prompt_logprobs"], body["prompt"]
        assert body["model"] == "teacher" and body["max_tokens"] == 1
        refusal = self._refuse(k, len(ids))
        if refusal:
            return 400, {"error": {"message": refusal}}
        choice = {"index": 0, "text": "", "prompt_token_ids": ids, "prompt_logprobs": self._log_probs(ids, k)}
        return 200, self._spoil({"object": "text_completion", "choices": [choice]})

    def _generate(self, body: dict) -> tuple[int, dict | bytes]:
        """Put in the tokens of images at their placeholders, one each."""
        if not self.enable_scale_out:
            message = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them."
            return 403, {"error": {"message": message, "type": "PermissionDeniedError", "code": 403}}
        sampling, processing = body["sampling_params"], self.processing
        assert body["model"] == "teacher" and body["return_token_ids"] and sampling["max_tokens"] == 1
        if processing is None:
            return 400, {"error": {"message": "teacher is not a multimodal model"}}
        with tempfile.TemporaryDirectory() as folder:
            store = ImageStore(Path(folder), Path(folder))
            images = [store.resolve(part["url"]) for part in body["content_parts"]]
            assert all(part["type"] == "image_url" for part in body["content_parts"])
            places = [slice(i, i + 1) for i, id_ in enumerate(body["token_ids"]) if id_ == processing.placeholder_id]
            tokens = [processing.tokens(image) for image in images]
            ids = replace_tokens(np.array(body["token_ids"]), places, tokens).tolist()
            k = sampling["prompt_logprobs"]
            refusal = self._refuse(k, len(ids))
            if refusal:
                return 400, {"error": {"message": refusal}}
            choice = {"index": 0, "token_ids": [2], "finish_reason": "length"}
            log_probs = self._log_probs(ids, k, images)
            return 200, self._spoil({"choices": [choice], "prompt_token_ids": ids, "prompt_logprobs": log_probs})

    def _refuse(self, k: int, length: int) -> str | None:
        if k > self.max_logprobs:
            return f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}"
        if length + 1 > self.max_model_len:
            return f"maximum context length is {self.max_model_len} tokens"
        return None

    def _spoil(self, answer: dict) -> dict | bytes:
        spoiled = self.spoil(answer) if self.spoil else None
        return answer if spoiled is None else spoiled

    @torch.no_grad()
    def _log_probs(self, ids: list[int], k: int, images: Sequence[Image] = ()) -> list[dict | None]:
        """As vLLM: the actual token first, wherever it ranks, then the k most likely ones."""
        if self.processing is None:
            logits = transformers_model(self.checkpoint)(torch.tensor([ids])).logits[0]
        else:
            logits = vision_logits(vision_model(self.checkpoint), self.processing, ids, images)
        log_probs = logits.log_softmax(-1)
        entries: list[dict | None] = [None]
        for row, token in zip(log_probs[:-1], ids[1:], strict=True):
            best = row.topk(k)
            found = {token: (row[token].item(), int((row >= row[token]).sum()))}
            found |= {i: (v, n) for n, (i, v) in enumerate(zip(*map(torch.Tensor.tolist, best[::-1]), strict=True), 1)}
            entries.append(
                {
                    str(i): {"logprob": max(v, -9999.0), "rank": n, "decoded_token": f"w{i}"}
                    for i, (v, n) in found.items()
                }
            )
        return entries


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], fake: FakeServer):
        super().__init__(address, _Handler)
        self.fake, self.connections = fake, set()

    def process_request(self, request, client_address) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def cut(self) -> None:
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has ended by itself

    def handle_error(self, request, client_address) -> None:
        pass  # connections that were cut


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def do_GET(self) -> None:
        self.respond({})

    def do_POST(self) -> None:
        self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def respond(self, body: dict) -> None:
        fake = self.server.fake
        if fake.api_key is not None and self.headers.get("Authorization") != f"Bearer {fake.api_key}":
            status, answer = 401, {"error": f"Unauthorized: {self.headers.get('Authorization')}"}
        else:
            status, answer = fake.answer(self.path, body)
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments) -> None:
        pass
