"""Read PEFT adapters from a folder into a model that has new ones, under any layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from megatron_gkd.checkpoint_format.adapter_files import WEIGHTS, AdapterFiles, AdapterProblem, factor_name
from megatron_gkd.checkpoint_format.fingerprint import weights_fingerprint
from megatron_gkd.checkpoint_format.lora_layers import AdaptedLayer, describe_joined
from megatron_gkd.errors import UserError
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.models.lora.injection import Adapters
from megatron_gkd.runtime.agreement import run_on_all
from megatron_gkd.runtime.quiet import hidden_stderr

from mcore_bridge import ModelConfig
from megatron.core.models.gpt import GPTModel


def read_adapters(
    chunks: Sequence[GPTModel], config: ModelConfig, adapters: Adapters, checkpoint: Checkpoint, folder: Path
) -> None:
    """Read the adapters in `folder` into `adapters`. All ranks of the world must call it.

    Raises:
        UserError: in all ranks; they are not of this base model, or have other layers, ranks or scales.
    """

    def read() -> None:
        files = AdapterFiles.open(folder)
        files.require_fit(adapters.layers, checkpoint.parameter_shapes)
        if files.base is not None and files.base != weights_fingerprint(checkpoint.path):
            raise AdapterProblem(f"its adapters are of other weights than those in student.model ({checkpoint.path})")
        _require_shared_factors(folder, adapters.layers)
        with hidden_stderr():
            config.bridge.load_weights(list(chunks), str(folder), peft_format=True)
        for factor in adapters.factors:
            if not bool(factor.parameter.isfinite().all()):
                raise AdapterProblem(f"NaN or infinite values in {factor.name}")

    def read_or_explain() -> None:
        try:
            read()
        except AdapterProblem as error:
            raise UserError(f"lora.adapters = {folder}: {error}") from error
        except Exception as error:  # whatever it is, the other ranks must raise it, too
            raise UserError(f"lora.adapters = {folder}: can't be read ({type(error).__name__}: {error})") from error

    run_on_all(read_or_explain)


def _require_shared_factors(folder: Path, layers: Sequence[AdaptedLayer]) -> None:
    """Raise AdapterProblem if modules that are one matrix in Megatron have different factors A."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for layer in layers:
            experts: dict[str, list[str]] = {}
            for hf_name in layer.base.hf_names:
                experts.setdefault(hf_name.rpartition(".")[0], []).append(hf_name)
            for first, *others in experts.values():
                if not others:
                    continue
                expected = file.get_tensor(factor_name(first, "A"))
                for other in others:
                    if not torch.equal(expected, file.get_tensor(factor_name(other, "A"))):
                        raise AdapterProblem(
                            f"the factors A of {first} and {other} differ; {describe_joined(layer.base)}. Merge the "
                            "adapters into their base, or train them with equal factors A"
                        )
