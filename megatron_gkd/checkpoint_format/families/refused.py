"""Families that are known and not supported, by architecture, with the reason."""

from __future__ import annotations

_SPARSE = "its sparse attention needs a later Megatron-Core than 0.16 for packed rows"
_UNREGISTERED = "mcore-bridge 1.6.5 does not map it"

REFUSED = {
    "DeepseekForCausalLM": "it is remote code only, which has not been compared with Megatron's",
    "DeepseekV32ForCausalLM": _SPARSE,
    "DeepseekV4ForCausalLM": "Megatron-Core 0.16 has neither its router's score nor its attention",
    "GlmMoeDsaForCausalLM": _SPARSE,
    "Ernie4_5_MoeForCausalLM": "mcore-bridge 1.6.5 drops the correction biases of its softmax router",
    "NemotronHForCausalLM": "Megatron-Core 0.16 has no hybrid models with experts",
    "MixtralForCausalLM": _UNREGISTERED,
    "Phi3ForCausalLM": f"{_UNREGISTERED}: its projections are joined in another order",
    "Gemma2ForCausalLM": f"{_UNREGISTERED}: its norms, scale and capped scores would be left out",
    "Gemma3ForCausalLM": f"{_UNREGISTERED}: its norms and its two rotary bases would be left out",
    "Olmo2ForCausalLM": f"{_UNREGISTERED}: its norms follow the layers that they precede elsewhere",
    "GraniteForCausalLM": f"{_UNREGISTERED}: its four multipliers would be left out",
    "CohereForCausalLM": f"{_UNREGISTERED}: its layers are parallel and its logits scaled",
    "Cohere2ForCausalLM": f"{_UNREGISTERED}: its layers are parallel and its logits scaled",
    "Llama4ForCausalLM": f"{_UNREGISTERED} without the vision tower; open the whole Llama4ForConditionalGeneration",
    "Qwen3_5ForCausalLM": f"{_UNREGISTERED} without the vision tower; open Qwen3_5ForConditionalGeneration",
    "BailingMoeForCausalLM": "it is remote code only, which has not been compared with Megatron's",
    "BailingMoeV2ForCausalLM": "it is remote code only, which has not been compared with Megatron's",
    "InternLM3ForCausalLM": "it is remote code only, which has not been compared with Megatron's",
    "MiMoForCausalLM": "it is remote code only, which has not been compared with Megatron's",
    "Gemma4ForConditionalGeneration": "its image tokens see each other both ways, which packed rows have no mask for",
    "Gemma3ForConditionalGeneration": f"{_UNREGISTERED}: its norms and its two rotary bases would be left out",
    "LlavaForConditionalGeneration": _UNREGISTERED,
    "LlavaOnevisionForConditionalGeneration": _UNREGISTERED,
    "Mistral3ForConditionalGeneration": _UNREGISTERED,
    "Idefics3ForConditionalGeneration": _UNREGISTERED,
    "Glm46VForConditionalGeneration": _UNREGISTERED,
    "InternVLChatModel": "it is remote code; open the checkpoint with -HF or -hf in its name, which transformers reads",
    "KimiVLForConditionalGeneration": "it is remote code only, which has not been compared with Megatron's",
    "Ovis2_5": "it is remote code only, which has not been compared with Megatron's",
    "Qwen2_5OmniModel": "models that read or write audio have not been compared with Megatron's",
    "Qwen3OmniMoeForConditionalGeneration": "models that read or write audio have not been compared with Megatron's",
}
"""Architectures that are refused by name, and why."""
