"""A vLLM server without a GPU: python fake_servers.py rollout|teacher --checkpoint FOLDER --host HOST --port PORT.

It serves /health, writes its process id to servers/PORT.pid, and the path of each request to servers/PORT.log.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    options = parser.parse_args()
    folder = Path("servers")
    folder.mkdir(exist_ok=True)
    (folder / f"{options.port}.pid").write_text(str(os.getpid()))
    log = (folder / f"{options.port}.log").open("a", buffering=1)
    start = start_rollout_server if options.kind == "rollout" else start_teacher_server
    start(options, lambda path: print(path, file=log))
    while True:
        time.sleep(60)


def start_rollout_server(options, note) -> None:
    assert os.environ["VLLM_SERVER_DEV_MODE"] == "1"
    from faults.student_server import StudentServer

    StudentServer(port=options.port, before=note).__enter__()


def start_teacher_server(options, note) -> None:
    from teachers.fake_server import FakeServer

    class Server(FakeServer):
        def answer(self, path, body):
            note(path)
            return (200, {}) if path == "/health" else super().answer(path, body)

    server = Server(options.checkpoint)
    server._log_probs([4, 5], 2)  # loads the model, so that a server that is ready answers at once
    server.start(options.port)


if __name__ == "__main__":
    main()
