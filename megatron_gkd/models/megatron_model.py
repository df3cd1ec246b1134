"""Build a Hugging Face causal language model, sharded over a mesh, from Megatron-Core modules.

mcore-bridge maps the parameters of each family. Outside `models` only `runtime` imports it
(`tests/runtime/test_boundaries.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.models.build_options import BuildOptions, build_config
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.models.family_settings import require_family_supports, require_stages
from megatron_gkd.models.fusions import lifted_head_refusal
from megatron_gkd.models.lora.factors import lora_modules
from megatron_gkd.models.lora.injection import Adapters, inject_adapters
from megatron_gkd.models.lora.merged import MergingExport
from megatron_gkd.models.lora.reading import read_adapters
from megatron_gkd.models.moe import freeze_routers, prepare_experts
from megatron_gkd.models.repairs import repair
from megatron_gkd.models.vision.forward import (
    PADDING_MASK,
    prepare_forward,
    recompute_tower,
    require_layers_of_features,
    vision_forward,
)
from megatron_gkd.models.vision.parts import freeze, language_model
from megatron_gkd.models.weight_loading import read_weights
from megatron_gkd.ops.output_head import OutputHead
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.current_phase import note_each
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.runtime.transformer_engine import choose_attention, needs_torch_attention, torch_attention
from megatron_gkd.runtime.transformer_engine.attention import TEDotProductAttention

from mcore_bridge import ModelConfig, get_mcore_model
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)


class MegatronModel:
    """The chunks of one model on this rank: one, or one for each virtual pipeline stage.

    Their forward returns the last hidden states, after the final norm, since the loss multiplies them by the head.

    Attributes:
        checkpoint: the checkpoint that the model was loaded from.
        chunks: the chunks, in the model's order.
        config: mcore-bridge's configuration of the model.
        mesh: the process groups.
        adapters: None if all parameters are trained.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        chunks: list[GPTModel],
        config: ModelConfig,
        mesh: Mesh,
        adapters: Adapters | None = None,
    ) -> None:
        self.checkpoint, self.chunks, self.config, self.mesh = checkpoint, chunks, config, mesh
        self.adapters = adapters
        self._export = None if adapters is None else MergingExport(config.bridge)
        for chunk in chunks:
            if chunk.post_process:
                # The module is still called: its hooks wait for its parameters.
                language_model(chunk).output_layer.forward = _pass_hidden_states

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        mesh: Mesh,
        options: BuildOptions,
        report: Callable[[int], None] = lambda read: None,
        *,
        needs_weights: bool = True,
    ) -> MegatronModel:
        """Build this rank's share of the checkpoint and read its weights. All ranks of the world must call it.

        Args:
            checkpoint: the checkpoint to load.
            mesh: the process groups.
            options: how to build the model.
            report: called with the number of tensors that this rank has read so far.
            needs_weights: whether to read the weights; false if all parameters are set afterwards.

        Raises:
            UserError: in all ranks; the checkpoint's tensors and the model's parameters do not match, or the layout or
                the options of LoRA do not suit the model.
        """
        require_family_supports(checkpoint, mesh.layout, has_lora=options.lora is not None)
        require_layers_of_features(checkpoint, require_stages(checkpoint, mesh.layout.pipeline, options))
        options = replace(options, attn=choose_attention(options.attn, options.dtype))
        config = build_config(checkpoint, mesh.layout, options)
        uses_torch = needs_torch_attention(options.attn, config)
        with mesh.virtual_stages(options.virtual_pipeline), portability.creation_on_device():
            with torch_attention() if uses_torch else contextlib.nullcontext(), lifted_head_refusal(config):
                chunks = [chunk.to(portability.device()) for chunk in get_mcore_model(config)]
            for chunk in chunks:
                repair(chunk, config)
            if needs_weights:
                read_weights(config.bridge, chunks, checkpoint, report)
            adapters = None
            if options.lora is not None:
                adapters = inject_adapters(
                    chunks, mesh, options.lora, config.num_moe_experts or 0, checkpoint.family.decoder
                )
                if options.lora.adapters is not None:
                    read_adapters(chunks, config, adapters, checkpoint, options.lora.adapters)
        for chunk in chunks:
            _mark_shards(chunk)
            prepare_experts(chunk)
            prepare_forward(chunk)
            if options.lora is None:  # otherwise all but the adapters is frozen
                freeze(chunk, options.frozen)
            if options.modules.freezes_routers:
                freeze_routers(chunk)
            if options.recomputes_tower:
                recompute_tower(chunk)
        return cls(checkpoint, chunks, config, mesh, adapters)

    @property
    def has_torch_attention(self) -> bool:
        """Whether this rank's layers compute their attention with torch rather than Transformer Engine."""
        return any(isinstance(module, TEDotProductAttention) for chunk in self.chunks for module in chunk.modules())

    @property
    def head_weight(self) -> nn.Parameter | None:
        """This rank's rows of the LM head, tied or not, [ceil(V/TP), H]; None before the last pipeline stage."""
        chunk = self.chunks[-1]
        if not chunk.post_process:
            return None
        if chunk.share_embeddings_and_output_weights:
            return chunk.shared_embedding_or_output_weight()
        return language_model(chunk).output_layer.weight

    @property
    def head(self) -> OutputHead | None:
        """This rank's rows of the LM head with what else makes its logits; None before the last pipeline stage."""
        weight = self.head_weight
        if weight is None:
            return None
        scaling = self.checkpoint.head_scaling
        return OutputHead(weight, language_model(self.chunks[-1]).output_layer.bias, scaling.scale, scaling.softcap)

    def named_tensors(self, merged_dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every whole parameter with its Hugging Face name. All ranks must iterate together.

        Adapters are merged into their layers.

        Args:
            merged_dtype: dtype of the layers with adapters; None for the model's. bf16 rounds small updates away.
        """
        with self.exporting() as bridge:
            with contextlib.nullcontext() if self._export is None else self._export.in_dtype(merged_dtype):
                yield from bridge.export_weights(self.chunks)

    def base_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the parameters of the model without its adapters, like `named_tensors`."""
        with self.exporting() as bridge:
            with contextlib.nullcontext() if self._export is None else self._export.base_weights():
                yield from bridge.export_weights(self.chunks)

    def adapter_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the adapters' whole factors with PEFT's names. All ranks must iterate together.

        Modules that share a factor A yield it once each.
        """
        with self.exporting_adapters() as bridge:
            yield from bridge.export_weights(self.chunks, peft_format=True)

    @contextlib.contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """Compute with the base model alone inside, bit-identically.

        PEFT's own switch also changes which parameters are trained, which the gradients' buffers must not see.
        """
        modules = [module for chunk in self.chunks for _, module in lora_modules(chunk)]
        before = [module._disable_adapters for module in modules]
        for module in modules:
            module._disable_adapters = True
        try:
            yield
        finally:
            for module, is_disabled in zip(modules, before, strict=True):
                module._disable_adapters = is_disabled

    @contextlib.contextmanager
    def exporting(self) -> Iterator[Any]:
        """Yield mcore-bridge's bridge, which exports merged weights. All ranks must make the same exports.

        Each tensor counts as progress of the phase.
        """
        bridge = self.config.bridge
        export = bridge.export_weights
        bridge.export_weights = lambda *arguments, **options: note_each(export(*arguments, **options))
        try:
            with self.mesh.virtual_stages(self.config.virtual_pipeline_model_parallel_size):
                yield bridge
        finally:
            vars(bridge).pop("export_weights", None)  # the class's own is used again

    @contextlib.contextmanager
    def exporting_adapters(self) -> Iterator[Any]:
        """Yield the bridge, which names layers as transformers does, even where checkpoints have older names."""
        with self.exporting() as bridge:
            bridge.hf_state_dict_mapping = {}  # hides the class's own
            try:
                yield bridge
            finally:
                del bridge.hf_state_dict_mapping


def hidden_states(chunk: GPTModel | DistributedDataParallel, microbatch: Microbatch) -> torch.Tensor:
    """Compute one chunk's output for this rank's tokens: [1, T, H], or [1, T/TP, H] under sequence parallelism."""
    boundaries, longest = microbatch.cu_seqlens, microbatch.max_seqlen
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        cu_seqlens_q_padded=boundaries,
        cu_seqlens_kv_padded=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    packed.num_labels = microbatch.num_labels  # for `models.moe`
    config = chunk.config
    extra = {}
    if config.num_moe_experts is not None:  # the router's balance must not include padding
        padding = microbatch.padding_mask
        if config.sequence_parallel:
            padding = padding.chunk(config.tensor_model_parallel_size, dim=1)[_tensor_parallel_rank(chunk)]
        extra[PADDING_MASK] = padding.contiguous()
    if language_model(chunk) is not getattr(chunk, "module", chunk):
        return vision_forward(chunk, microbatch, packed_seq_params=packed, **extra)
    return chunk(
        microbatch.input_ids, microbatch.position_ids, None, packed_seq_params=packed, extra_block_kwargs=extra
    )


@contextlib.contextmanager
def in_eval_mode(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Switch dropout off inside; afterwards every module has its own mode again."""
    training = [(module, module.training) for chunk in chunks for module in chunk.modules()]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


def _mark_shards(chunk: nn.Module) -> None:
    """Mark sharded weights as Megatron's initialization does, which a loaded model skips.

    Without the mark they count as replicas, and the gradient's norm includes them from one tensor-parallel rank only.
    """
    for module in chunk.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
            dimension = 0
        elif isinstance(module, RowParallelLinear):
            dimension = 1
        else:
            continue
        weight = module.weight
        if weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dimension, stride=1)


def _tensor_parallel_rank(chunk: GPTModel | DistributedDataParallel) -> int:
    return language_model(chunk).pg_collection.tp.rank()


def _pass_hidden_states(hidden: torch.Tensor, *args: Any, **options: Any) -> tuple[torch.Tensor, None]:
    # The caller transposes them to [1, T, H]. Without these views their gradient would have the strides of a transposed
    # tensor, for which torch multiplies each token apart, with a weight for each.
    return hidden.flatten(0, 1).unflatten(0, hidden.shape[:2]), None
