"""Open a Hugging Face checkpoint on disk: its path, its configuration, and the tensors that it has."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from megatron_gkd.checkpoint_format.adapter_files import AdapterFiles, AdapterProblem
from megatron_gkd.checkpoint_format.config_file import CheckpointProblem, read_config, require_trust
from megatron_gkd.checkpoint_format.config_values import num_experts
from megatron_gkd.checkpoint_format.families import FAMILIES, Family
from megatron_gkd.checkpoint_format.model_shape import ModelShape, shape_of
from megatron_gkd.checkpoint_format.output_head import HeadScaling, read_head_scaling
from megatron_gkd.checkpoint_format.quantization import block_size, is_scale
from megatron_gkd.checkpoint_format.stored_tensor import StoredTensor
from megatron_gkd.checkpoint_format.weight_files import count_parameters, head_name, read_tensors
from megatron_gkd.data.vision.processing import ImageProcessing
from megatron_gkd.data.vision.processor import PixelLimits, open_processing
from megatron_gkd.errors import UserError
from megatron_gkd.models.location import locate, locate_configuration, locate_without_weights
from megatron_gkd.models.merged_adapters import MergedAdapters
from megatron_gkd.models.own_configurations import register_own_configurations
from megatron_gkd.runtime.hubs import ModelSource
from megatron_gkd.runtime.nodes import Nodes

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json")


@dataclass(frozen=True)
class Checkpoint:
    """A local directory in Hugging Face's layout.

    Attributes:
        path: the directory.
        config: of transformers.
        tensors: the parameters in its safetensors files, by name; empty if only the configuration was opened.
        adapters: PEFT adapters that are merged into the weights when these are read; None for the weights as stored.
        hub_id: the hub's name of a model that was downloaded.
        revision: of a model that was downloaded; see `location.Location`.
        trust_remote_code: whether a tokenizer that is code in the directory may be run.
    """

    path: Path
    config: PretrainedConfig
    tensors: dict[str, StoredTensor] = field(repr=False)
    adapters: MergedAdapters | None = None
    hub_id: str | None = None
    trust_remote_code: bool = False
    revision: str | None = None

    @classmethod
    def open(
        cls, model: str | ModelSource, nodes: Nodes | None = None, *, trust_remote_code: bool = False
    ) -> Checkpoint:
        """Open a directory or a hub id, which one rank of each node downloads. All ranks of `nodes` must call it.

        Args:
            model: the directory or the hub id, of Hugging Face's newest revision where it is a text.
            nodes: the run's nodes; None for this process alone.
            trust_remote_code: whether a tokenizer that is code in the directory may be run.

        Raises:
            RunStopped: in all ranks; there is no such directory or hub model, or the nodes' directories differ.
            UserError: config.json is not supported, or the safetensors files don't hold exactly the parameters that it
                describes.
        """
        source = ModelSource(model) if isinstance(model, str) else model
        location = locate(source, nodes or Nodes.alone())
        path = location.path
        try:
            raw = read_config(path)
            require_trust(path, trust_remote_code=trust_remote_code)
            tensors = read_tensors(path, raw)
        except CheckpointProblem as problem:
            raise UserError(f"{model}: {problem}") from problem
        hub_id = None if location.revision is None else source.name
        return cls(
            path,
            _open_configuration(source.name, path),
            tensors,
            hub_id=hub_id,
            trust_remote_code=trust_remote_code,
            revision=location.revision,
        )

    @classmethod
    def open_configuration(cls, model: str | ModelSource) -> Checkpoint:
        """Open the config.json of a directory or a hub id alone: a model without weights can be built from it.

        Raises:
            UserError: there is no such directory or hub model, or its config.json is not supported.
        """
        source = ModelSource(model) if isinstance(model, str) else model
        # No tokenizer is opened.
        return cls._open_folder(source, locate_configuration(source), trust_remote_code=True)

    @classmethod
    def open_without_weights(cls, source: ModelSource, *, trust_remote_code: bool = False) -> Checkpoint:
        """Open all files of a directory or a hub id but the weights: its configuration, tokenizer and processor.

        Raises:
            UserError: there is no such directory or hub model, or its config.json is not supported.
        """
        return cls._open_folder(source, locate_without_weights(source), trust_remote_code=trust_remote_code)

    @classmethod
    def _open_folder(cls, source: ModelSource, path: Path, *, trust_remote_code: bool) -> Checkpoint:
        try:
            read_config(path)
            require_trust(path, trust_remote_code=trust_remote_code)
        except CheckpointProblem as problem:
            raise UserError(f"{source}: {problem}") from problem
        hub_id = None if source.is_directory else source.name
        config = _open_configuration(source.name, path)
        return cls(path, config, {}, hub_id=hub_id, trust_remote_code=trust_remote_code)

    def with_adapters(self, folder: Path, key: str) -> Checkpoint:
        """Return this checkpoint with the PEFT adapters in `folder` merged; `key` is the recipe's key for messages.

        Raises:
            UserError: the adapters are not of this model, or can't be read.
        """
        try:
            AdapterFiles.open(folder).require_base(self.path)
            merged = MergedAdapters(folder, self.parameter_shapes, self.family.parameter_name)
            return replace(self, adapters=merged)
        except AdapterProblem as problem:
            raise UserError(f"{key} = {folder}: {problem}") from problem

    def has_weights_of(self, other: Checkpoint) -> bool:
        """Return whether `other` is the same directory, both without adapters."""
        return self.adapters is other.adapters is None and self.path.resolve() == other.path.resolve()

    @property
    def has_weights(self) -> bool:
        """Whether the files of the weights were opened, too."""
        return bool(self.tensors)

    @property
    def family(self) -> Family:
        """What is known of the model's family."""
        return FAMILIES[self.config.model_type]

    @property
    def text_config(self) -> PretrainedConfig:
        """The part of `config` that describes the language model; `config` itself for a language model alone."""
        return self.config.get_text_config()

    @functools.cached_property
    def head_scaling(self) -> HeadScaling:
        """How the model scales and bounds its logits."""
        return read_head_scaling(self.text_config.to_dict(), self.family.head_keys)

    @property
    def vocab_size(self) -> int:
        """Number of rows of the checkpoint's embedding: the ids in its softmax."""
        return self.text_config.vocab_size

    @property
    def has_images(self) -> bool:
        """Whether the model reads images."""
        return self.family.has_images

    def images(self, limits: PixelLimits | None = None) -> ImageProcessing | None:
        """Return what the processor makes of images within `limits`, opened once; None for a text model."""
        if not self.has_images:
            return None
        key = limits or PixelLimits()
        if key not in self._images:
            self._images[key] = open_processing(self.path, key)
        return self._images[key]

    @property
    def reserved_ids(self) -> tuple[int, ...]:
        """The ids that stand for images, whatever their limits; none of a text model."""
        opened = next(iter(self._images.values()), None) or self.images()
        return () if opened is None else opened.reserved_ids

    @functools.cached_property
    def _images(self) -> dict[PixelLimits, ImageProcessing | None]:
        return {}

    @functools.cached_property
    def is_tied(self) -> bool:
        """Whether the LM head is the embedding: the configuration says so, or no file has a head.

        A multimodal model's default does not count where a file has a head: transformers reads it, too.
        """
        if self.has_weights and head_name(self.tensors) is None:
            return True
        if self.has_images:
            return bool(_read_json(self.path / "config.json").get("tie_word_embeddings"))
        return bool(self.config.tie_word_embeddings)

    @property
    def block_size(self) -> tuple[int, int] | None:
        """The rows and columns that share a scale in FP8 files, None for other files."""
        return block_size(self.config.to_dict())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each of `tensors`, without the scales of FP8 matrices."""
        has_scales = self.block_size is not None
        return {name: one.shape for name, one in self.tensors.items() if not (has_scales and is_scale(name))}

    @property
    def shape(self) -> ModelShape:
        """What a layout and a recipe have to fit."""
        return shape_of(self.config.to_dict())

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """`shapes` by the names in transformers, where files have older names."""
        return {self.family.parameter_name(name): shape for name, shape in self.shapes.items()}

    @property
    def num_parameters(self) -> int:
        """Number of the model's parameters over all ranks; a head that is the embedding counts once."""
        return count_parameters(self.tensors, is_tied=self.is_tied)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a completion: those of generation_config.json, else those of config.json."""
        generation = self.path / GENERATION_CONFIG_NAME
        ids = _read_json(generation).get("eos_token_id") if generation.exists() else self.config.eos_token_id
        return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)

    @property
    def is_moe(self) -> bool:
        """Whether the model is a mixture of experts."""
        return num_experts(self.text_config.to_dict()) > 0

    @property
    def router_aux_loss_coef(self) -> float:
        """The checkpoint's coefficient of the experts' load-balancing loss; 0 where it names none."""
        return float(getattr(self.text_config, "router_aux_loss_coef", None) or 0.0)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Open the tokenizer.

        Raises:
            UserError: the directory has none. (Without its files transformers would return an empty one.)
        """
        if not any((self.path / name).exists() for name in _TOKENIZERS):
            raise UserError(
                f"{self.path}: has no tokenizer; expected {', '.join(_TOKENIZERS[:-1])} or {_TOKENIZERS[-1]}"
            )
        try:
            return AutoTokenizer.from_pretrained(
                self.path, config=self.config, trust_remote_code=self.trust_remote_code
            )
        except Exception as error:  # transformers and code in the folder raise many kinds
            raise UserError(f"{self.path}: the tokenizer can't be opened ({' '.join(str(error).split())})") from error


def _open_configuration(model: str, path: Path) -> PretrainedConfig:
    register_own_configurations()
    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:  # transformers raises many kinds for a wrong value
        reason = " ".join(str(error).split())
        raise UserError(f"{model}: its config.json is not a model's configuration ({reason})") from error


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a JSON object")
    return content
