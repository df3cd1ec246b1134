"""A vLLM server in processes of its own, for tests: started, killed, started again at the same address.

It runs in the environment that `scripts/setup_vllm.sh` makes, or in that of the python which MEGATRON_GKD_VLLM_PYTHON
names.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import httpx
import torch
from ports import free_port

REPOSITORY = Path(__file__).resolve().parents[1]
PYTHON = Path(os.environ.get("MEGATRON_GKD_VLLM_PYTHON", REPOSITORY / ".venv-vllm/bin/python"))
WHY_ABSENT = f"no vLLM: {PYTHON} does not exist; `bash scripts/setup_vllm.sh` makes .venv-vllm"
READY_SECONDS = 300.0
TRANSFER_BACKEND = "nccl" if torch.cuda.device_count() > 1 else "gloo"
"""For weights between this process and the server, which on GPUs has the second one alone."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",  # otherwise the first log-probabilities take most of a minute
}


def is_installed() -> bool:
    return PYTHON.exists()


class VllmServer:
    """A server that can be restarted.

    Args:
        model: a checkpoint directory.
        log: collects the output of all its processes.
        lora_rank: of the adapters that it takes at run time; None: it takes whole weights.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        *,
        max_model_len: int = 256,
        max_num_seqs: int = 32,
        dtype: str = "float32",
        lora_rank: int | None = None,
    ):
        self.model, self.log, self.port = model, log, free_port()
        self.flags, self.environment = ["--enforce-eager"], ENVIRONMENT | {"VLLM_SERVER_DEV_MODE": "1"}
        self.arguments = {
            "--model": model,
            "--served-model-name": "student",
            "--host": "127.0.0.1",
            "--port": self.port,
            "--dtype": dtype,
            "--max-model-len": max_model_len,
            "--max-num-seqs": max_num_seqs,
            "--max-logprobs": 64,
            "--kv-cache-memory-bytes": 32 << 20,
            "--weight-transfer-config": json.dumps({"backend": TRANSFER_BACKEND}),
        }
        if TRANSFER_BACKEND == "gloo":
            self.arguments["--worker-extension-cls"] = "megatron_gkd.rollout.vllm_worker.WorkerExtension"
        if lora_rank is not None:
            self.flags.append("--enable-lora")
            self.arguments["--max-lora-rank"] = lora_rank
            self.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the server, and return at once; see `wait_until_ready`."""
        module = ["-m", "vllm.entrypoints.openai.api_server"]  # the vllm command looks for a package named vllm
        arguments = [str(part) for pair in self.arguments.items() for part in pair]
        # This package without its requirements.
        environment = os.environ | self.environment | {"PYTHONPATH": str(REPOSITORY)}
        if TRANSFER_BACKEND == "nccl":
            environment["CUDA_VISIBLE_DEVICES"] = "1"
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [str(PYTHON), *module, *arguments, *self.flags],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Wait; raise RuntimeError with the log's end if it dies, or takes longer than READY_SECONDS."""
        deadline = time.monotonic() + READY_SECONDS
        while not self.is_healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the vLLM server did not come up:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.5)

    def is_healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5, trust_env=False).is_success
        except httpx.TransportError:
            return False

    def ensure_running(self) -> None:
        if self.process is None or self.process.poll() is not None:
            self.start()
        self.wait_until_ready()

    def kill(self) -> None:
        """Kill all processes of the server at once."""
        if self.process is not None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.process.wait()
