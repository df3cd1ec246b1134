"""A vLLM server of the student without a model, over HTTP, in a thread of the test process: it survives the trainer.

Its completions are a function of its weights and of the request's seed; see ``fake_vllm``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
from fake_vllm import FakeVllm


class StudentServer:
    """Usable in a `with` statement, in which it runs. `before` takes the path of each request; see ``fake_vllm``."""

    def __init__(self, port: int = 0, before: Callable[[str], None] = lambda path: None):
        self.vllm = FakeVllm(before)
        self._http = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
        self._http.daemon_threads, self._http.vllm = True, self.vllm
        self._http.handle_error = lambda *arguments: None  # the trainer was killed and reads no response

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> StudentServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._http.shutdown()
        self._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.respond(b"")

    def do_POST(self) -> None:
        self.respond(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def respond(self, content: bytes) -> None:
        while True:
            try:
                response = self.server.vllm.respond(httpx.Request(self.command, self.server_url, content=content))
                break
            except httpx.ReadTimeout:  # it is paused: the request waits
                time.sleep(0.01)
        self.send_response(response.status_code)
        self.send_header("Content-Length", str(len(response.content)))
        self.end_headers()
        self.wfile.write(response.content)

    @property
    def server_url(self) -> str:
        return f"http://127.0.0.1{self.path}"

    def log_message(self, *arguments) -> None:
        pass
