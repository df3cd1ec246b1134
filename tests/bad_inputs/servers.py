"""Bad servers: nobody listens, or something that is no vLLM server."""

from __future__ import annotations

import functools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from bad_inputs.case import Case
from bad_inputs.workspace import Change, with_recipe
from ports import free_port

NO_WAIT = ("--gkd_logits_topk", "4", "--temperature", "1", "--teacher_server_max_downtime_s", "0")
NO_WAIT_FOR_ROLLOUTS = ("--lmbda", "1", "--engine", "vllm_server", "--vllm_server_max_downtime_s", "0")


class _Handler(BaseHTTPRequestHandler):
    def _respond(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, content = self.server.response
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = _respond  # noqa: N815  (the names of the base class)

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


@functools.cache
def serve(status: int, content: bytes) -> str:
    """Return the address of a server that gives every request this response, as long as the tests run."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads, server.response = True, (status, content)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


def teacher(status: int, content: bytes | str) -> Change:
    """Return a change to a teacher behind a server that gives this response."""

    def change(folder: Path) -> None:
        url = serve(status, content.encode() if isinstance(content, str) else content)
        with_recipe("{teacher_model: teacher}", f"{{teacher_model_server: '{url}'}}")(folder)

    return change


def rollouts(status: int, content: bytes | str) -> Change:
    """Return a change to a rollout server that gives this response."""

    def change(folder: Path) -> None:
        url = serve(status, content.encode() if isinstance(content, str) else content)
        with_recipe("max_completion_length: 8", f"max_completion_length: 8, vllm_server_urls: ['{url}']")(folder)

    return change


def nobody(folder: Path) -> None:
    with_recipe("{teacher_model: teacher}", f"{{teacher_model_server: 'http://127.0.0.1:{free_port()}'}}")(folder)


def nobody_samples(folder: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with_recipe("max_completion_length: 8", f"max_completion_length: 8, vllm_server_urls: ['{url}']")(folder)


MODELS = json.dumps({"data": [{"id": "m", "max_model_len": 4096}]})
SHORT = json.dumps({"data": [{"id": "m", "max_model_len": 16}]})
RESPONSES: dict[str, tuple[int, bytes | str, str, int]] = {
    "broken JSON": (200, "{", "the response is not that of a vLLM server", 2),
    "HTML": (200, "<html>welcome</html>", "the response is not that of a vLLM server", 2),
    "binary": (200, bytes(range(256)), "the response is not that of a vLLM server", 2),
    "empty object": (200, "{}", "the response is not that of a vLLM server", 2),
    "list": (200, "[]", "the response is not that of a vLLM server", 2),
    "null": (200, "null", "the response is not that of a vLLM server", 2),
    "nothing": (200, "", "the response is not that of a vLLM server", 2),
    "no model": (200, '{"data": []}', "the response is not that of a vLLM server", 2),
    "not found": (404, "no", "404", 2),
    "refused": (400, "no", "400", 2),
    "unauthorized": (401, "no", "401", 2),
    "broken": (500, "no", "500", 69),
    "busy": (429, "no", "429", 69),
}
CASES = [
    Case("no teacher server", "127.0.0.1", nobody, NO_WAIT, code=69),
    Case("no rollout server", "127.0.0.1", nobody_samples, NO_WAIT_FOR_ROLLOUTS, code=69),
    Case(
        "teacher server of another protocol",
        "teacher_model_server",
        with_recipe("{teacher_model: teacher}", "{teacher_model_server: 'ftp://x'}"),
        NO_WAIT,
    ),
    Case("teacher server with short sequences", "max-model-len", teacher(200, SHORT), NO_WAIT),
    *(
        Case(f"teacher server: {name}", message, teacher(status, content), NO_WAIT, code=code)
        for name, (status, content, message, code) in RESPONSES.items()
    ),
    *(
        Case(f"rollout server: {name}", message, rollouts(status, content), NO_WAIT_FOR_ROLLOUTS, code=code)
        for name, (status, content, message, code) in RESPONSES.items()
    ),
]
