"""A Hugging Face checkpoint on disk: where it is, what it configures, and which of its features are supported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from megatron_gkd.errors import UserError
from megatron_gkd.models.location import locate
from megatron_gkd.runtime.nodes import Nodes

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")


@dataclass(frozen=True)
class Checkpoint:
    """A local directory in Hugging Face's layout."""

    path: Path
    config: PretrainedConfig

    @classmethod
    def open(cls, model: str, nodes: Nodes | None = None) -> Checkpoint:
        """Open a directory or a hub id, which one rank of each node downloads. All ranks of `nodes` must call it.

        Raises UserError for a directory without weights or of an unsupported architecture.
        """
        path = locate(model, nodes or Nodes.alone())
        if not any(path.glob("*.safetensors")):
            raise UserError(f"{model}: no *.safetensors file in {path}")
        config = AutoConfig.from_pretrained(path)
        _check_supported(model, config)
        return cls(path, config)

    @property
    def vocab_size(self) -> int:
        """Rows of the checkpoint's embedding: the ids that take part in its softmax."""
        return self.config.vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a completion: those of generation_config.json, else those of config.json."""
        has_own = (self.path / GENERATION_CONFIG_NAME).exists()
        found = (GenerationConfig.from_pretrained(self.path) if has_own else self.config).eos_token_id
        return () if found is None else (found,) if isinstance(found, int) else tuple(found)

    @property
    def is_moe(self) -> bool:
        return self.config.model_type == "qwen3_moe"

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises UserError if there is none. (Without its files transformers would make up an empty one.)"""
        if not any((self.path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise UserError(f"{self.path}: no tokenizer there (tokenizer.json, tokenizer.model or vocab.json)")
        try:
            return AutoTokenizer.from_pretrained(self.path)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: no tokenizer can be opened there ({error})") from error


def _check_supported(model: str, config: PretrainedConfig) -> None:
    architecture = (config.architectures or ["unknown"])[0]
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise UserError(f"{model}: architecture {architecture} is not one of {', '.join(SUPPORTED_ARCHITECTURES)}")
    if config.model_type == "qwen3_moe" and (config.decoder_sparse_step != 1 or config.mlp_only_layers):
        raise UserError(f"{model}: only checkpoints whose every layer is a mixture of experts are supported")
    if getattr(config, "use_sliding_window", False):
        raise UserError(f"{model}: use_sliding_window is not supported")
