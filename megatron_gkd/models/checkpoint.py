"""Open a Hugging Face checkpoint on disk: its path, its configuration, and the tensors that it has."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from megatron_gkd.checkpoint_format.adapter_files import AdapterFiles, AdapterProblem
from megatron_gkd.checkpoint_format.config_file import CheckpointProblem, architecture, read_config
from megatron_gkd.checkpoint_format.weight_files import HEAD, StoredTensor, read_tensors
from megatron_gkd.errors import UserError
from megatron_gkd.models.location import locate
from megatron_gkd.models.merged_adapters import MergedAdapters
from megatron_gkd.runtime.nodes import Nodes


@dataclass(frozen=True)
class Checkpoint:
    """A local directory in Hugging Face's layout.

    Attributes:
        path: the directory.
        config: of transformers.
        tensors: the parameters in its safetensors files, by name.
        adapters: PEFT adapters that are merged into the weights when these are read; None for the weights as stored.
        hub_id: the hub's name of a model that was downloaded.
    """

    path: Path
    config: PretrainedConfig
    tensors: dict[str, StoredTensor] = field(repr=False)
    adapters: MergedAdapters | None = None
    hub_id: str | None = None

    @classmethod
    def open(cls, model: str, nodes: Nodes | None = None) -> Checkpoint:
        """Open a directory or a hub id, which one rank of each node downloads. All ranks of `nodes` must call it.

        Raises:
            RunStopped: in all ranks; there is no such directory or hub model, or the nodes' directories differ.
            UserError: config.json is not supported, or the safetensors files don't hold exactly the parameters that it
                describes.
        """
        path = locate(model, nodes or Nodes.alone())
        try:
            raw = read_config(path)
            tensors = read_tensors(path, raw)
        except CheckpointProblem as problem:
            raise UserError(f"{model}: {problem}") from problem
        try:
            config = AutoConfig.from_pretrained(path)
        except Exception as error:  # transformers raises many kinds for a wrong value
            reason = " ".join(str(error).split())
            raise UserError(f"{model}: its config.json is not a model's configuration ({reason})") from error
        return cls(path, config, tensors, hub_id=None if Path(model).is_dir() else model)

    def with_adapters(self, folder: Path, key: str) -> Checkpoint:
        """Return this checkpoint with the PEFT adapters in `folder` merged; `key` is the recipe's key for messages.

        Raises:
            UserError: the adapters are not of this model, or can't be read.
        """
        try:
            AdapterFiles.open(folder).require_base(self.path)
            return replace(self, adapters=MergedAdapters(folder, self.shapes))
        except AdapterProblem as problem:
            raise UserError(f"{key} = {folder}: {problem}") from problem

    def has_weights_of(self, other: Checkpoint) -> bool:
        """Return whether `other` is the same directory, both without adapters."""
        return self.adapters is other.adapters is None and self.path.resolve() == other.path.resolve()

    @property
    def vocab_size(self) -> int:
        """Number of rows of the checkpoint's embedding: the ids in its softmax."""
        return self.config.vocab_size

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each of `tensors`."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def num_parameters(self) -> int:
        """Number of the model's parameters over all ranks; a head that is the embedding counts once."""
        is_tied = self.config.tie_word_embeddings
        return sum(math.prod(shape) for name, shape in self.shapes.items() if not (is_tied and name == HEAD))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a completion: those of generation_config.json, else those of config.json."""
        generation = self.path / GENERATION_CONFIG_NAME
        ids = _read_json(generation).get("eos_token_id") if generation.exists() else self.config.eos_token_id
        return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)

    @property
    def is_moe(self) -> bool:
        """Whether the model is a mixture of experts."""
        return architecture(self.config.model_type).has_experts

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Open the tokenizer.

        Raises:
            UserError: the directory has none. (Without its files transformers would return an empty one.)
        """
        if not any((self.path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise UserError(f"{self.path}: has no tokenizer; expected tokenizer.json, tokenizer.model or vocab.json")
        try:
            return AutoTokenizer.from_pretrained(self.path)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: the tokenizer can't be opened ({error})") from error


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a JSON object")
    return content
