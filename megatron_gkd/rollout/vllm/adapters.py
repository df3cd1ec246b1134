"""Send the student's adapters to vLLM servers that serve its base (`rollout.weight_sync: lora`).

Each version is a folder of PEFT files, which a server loads at run time under a name of its own: prefix caches and
requests know adapters by their names, so nothing computed with another version can be taken for this one's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from megatron_gkd.checkpoint_format.adapter_files import CONFIG, WEIGHTS
from megatron_gkd.rollout.vllm.client import StudentServer
from megatron_gkd.rollout.vllm.weight_folder import (
    VERSION_PREFIX,
    Shapes,
    SharedWeights,
    WeightFolder,
    explain_refusal,
    shared_weights_of,
)


class AdapterFolder(WeightFolder):
    """Write one version of the adapters after another into `root`.

    Args:
        root: made if missing. Folders in it whose name begins with "weights-" belong to this class.
        expected: names and shapes of PEFT's tensors that every version has to have.
        config: adapter_config.json.
    """

    def __init__(self, root: Path, expected: Shapes, config: Mapping[str, Any]) -> None:
        super().__init__(root, expected)
        self.config = config

    def _save(self, named_tensors: Iterable[tuple[str, Tensor]], directory: Path) -> Shapes:
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in named_tensors}
        save_file(tensors, directory / WEIGHTS)
        (directory / CONFIG).write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def adapter_name(weights: SharedWeights) -> str:
    """Return the name of this version of the adapters on a server."""
    return weights.directory.name


def load_adapters_from_folder(server: StudentServer) -> None:
    """Let a server that sees the folder load the wanted adapters, and unload other versions: any rank may do it."""
    weights = shared_weights_of(server)
    weights.validate()
    server.pause()
    for name in server.served_adapters():
        if name.startswith(VERSION_PREFIX):
            server.unload_adapter(name)
    problem = (
        f"can't load the adapters in {weights.directory}. Does it see this folder under this path "
        "(rollout.weight_sync_dir), and does it serve student.model?"
    )
    with explain_refusal(server, problem):
        server.load_adapter(adapter_name(weights), weights.directory)
