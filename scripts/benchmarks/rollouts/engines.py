"""The engines that are compared. Each generates a request as a whole, from weights that are loaded already."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, GenerationConfig

import megatron_gkd.runtime.preload  # noqa: F401  (before any import of Megatron-Core)
from benchmarks.peers import Unavailable
from benchmarks.rollouts.cases import Case
from megatron_gkd.models.build_options import BuildOptions
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.models.megatron_model import MegatronModel
from megatron_gkd.rollout.base import Sampling
from megatron_gkd.rollout.megatron.engine import MegatronEngine
from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh

REPOSITORY = Path(__file__).resolve().parents[3]
INSTALL_VLLM = "bash scripts/setup_vllm.sh"
PYTHON_VARIABLE = "MEGATRON_GKD_VLLM_PYTHON"


@dataclass(frozen=True)
class Request:
    """What an engine generates.

    Attributes:
        case: the prompts, and how tokens are drawn.
        prompts: token ids.
        stop_token_ids: each ends a completion.
    """

    case: Case
    prompts: list[list[int]]
    stop_token_ids: tuple[int, ...] = ()

    @property
    def max_tokens(self) -> int:
        """Most tokens of a completion."""
        return self.case.completion_lengths[1]


class Engine(Protocol):
    """A way to generate."""

    def generate(self, request: Request) -> list[list[int]]:
        """Return the completions' token ids, with the stop token."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


class Embedded:
    """The engine `megatron` of this package, in this process."""

    def __init__(self, model: Path) -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        mesh = initialize_mesh(Layout(), seed=1)
        options = BuildOptions(dtype=torch.float32)
        self._engine = MegatronEngine(MegatronModel.load(Checkpoint.open(str(model)), mesh, options), [])

    def generate(self, request: Request) -> list[list[int]]:
        sampling = Sampling(
            request.max_tokens,
            **({"temperature": 0.0} | request.case.sampling),
            stop_token_ids=request.stop_token_ids,
            ignore_eos=True,
        )
        found = self._engine.generate(request.prompts, sampling, range(len(request.prompts)))
        return [completion.token_ids for completion in found]

    def close(self) -> None:
        destroy_mesh()


class Transformers:
    """`generate` of transformers with a cache, all prompts in one batch that is padded on the left."""

    def __init__(self, model: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    @torch.no_grad()
    def generate(self, request: Request) -> list[list[int]]:
        longest = max(map(len, request.prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in request.prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in request.prompts])
        config = GenerationConfig(
            max_new_tokens=request.max_tokens,
            do_sample=not request.case.is_greedy,
            **({} if request.case.is_greedy else {"top_k": 0}),
            **request.case.sampling,
            eos_token_id=list(request.stop_token_ids) or None,
            pad_token_id=0,
            use_cache=True,
        )
        torch.manual_seed(0)
        found = self._model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, longest:]
        return [_until_stop(row, request.stop_token_ids) for row in found.tolist()]

    def close(self) -> None:
        del self._model


def _until_stop(tokens: Sequence[int], stop_token_ids: Sequence[int]) -> list[int]:
    """Return the tokens up to the first stop token, that one included."""
    places = [place for place, token in enumerate(tokens) if token in stop_token_ids]
    return list(tokens[: places[0] + 1] if places else tokens)


class Vllm:
    """vLLM in a process of its own, in the environment that `scripts/setup_vllm.sh` makes."""

    def __init__(self, model: Path) -> None:
        python = Path(os.environ.get(PYTHON_VARIABLE, REPOSITORY / ".venv-vllm/bin/python"))
        if not python.exists():
            raise Unavailable("not installed", f"{INSTALL_VLLM}, or {PYTHON_VARIABLE}=PYTHON")
        self._log = (model / "vllm.log").open("w")
        self._process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name("vllm_process.py")), str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | {"PYTHONPATH": ""},
        )
        if self._read() != "ready":
            raise Unavailable(f"did not start: {Path(self._log.name).read_text()[-400:]}")

    def generate(self, request: Request) -> list[list[int]]:
        message = {
            "prompts": request.prompts,
            "sampling": {"temperature": 0.0} | request.case.sampling,
            "max_tokens": request.max_tokens,
            "stop_token_ids": request.stop_token_ids,
        }
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        found = self._read()
        if found is None:
            raise Unavailable(f"failed: {Path(self._log.name).read_text()[-400:]}")
        return found

    def _read(self) -> object:
        """Return the next value that the process has written; None if it has ended."""
        line = self._process.stdout.readline()
        return json.loads(line) if line else None

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)
        self._log.close()


OURS = "megatron_gkd"
ENGINES = {OURS: Embedded, "transformers": Transformers, "vLLM": Vllm}
