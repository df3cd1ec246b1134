"""Tiny random multimodal checkpoints in Hugging Face layout with tokenizer and image processor; rows with images."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

VOCAB_SIZE = 301
IMAGE_ID, VIDEO_ID, START_ID, END_ID = 290, 291, 292, 293
NUM_WORDS = 282  # w0 to w281 have the ids 4 to 285

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% elif part['type'] == 'video' %}VIDEO"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# By kind of processor: what the template writes for an image, and the tokens from IMAGE_ID on.
_QWEN = ("<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|> <|video_pad|> <|vision_start|> <|vision_end|>")
_INTERN = ("<IMG_CONTEXT>\n", "<IMG_CONTEXT> <video> <img> </img>")
_GLM = (
    "<|begin_of_image|><|image|><|end_of_image|>",
    "<|image|> <|video|> <|begin_of_image|> <|end_of_image|> <|begin_of_video|> <|end_of_video|>",
)
_LLAMA = (
    "<|image|>",
    "<|patch|> <|unused|> <|image_start|> <|image_end|> <|image|> <|tile_x_separator|> <|tile_y_separator|>",
)
_NAMED = {  # attributes of InternVL's tokenizer
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}

_TEXT: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.08,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=2,
    pad_token_id=0,
)
_EXPERTS = dict(moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
_DELTA = dict(
    full_attention_interval=2,
    layer_types=["linear_attention", "full_attention"] * 2,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_conv_kernel_dim=4,
)
_GLM_EXPERTS = dict(
    moe_intermediate_size=32,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    routed_scaling_factor=1.5,
    norm_topk_prob=True,
)
_QWEN3_TOWER = dict(
    depth=3,
    hidden_size=32,
    intermediate_size=64,
    num_heads=2,
    out_hidden_size=64,
    patch_size=4,
    num_position_embeddings=64,
)
_DEEPSTACK = _QWEN3_TOWER | dict(deepstack_visual_indexes=[0, 1])
_GLM_TOWER = dict(
    depth=2, hidden_size=32, intermediate_size=64, out_hidden_size=64, num_heads=2, patch_size=4, image_size=32
)
_INTERN_TOWER = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    image_size=(16, 16),
    patch_size=(4, 4),
)
_QWEN_IDS = dict(image_token_id=IMAGE_ID, video_token_id=VIDEO_ID, vision_start_token_id=START_ID)
_QWEN_IDS |= dict(vision_end_token_id=END_ID)
_GLM_IDS = dict(
    image_token_id=IMAGE_ID,
    video_token_id=VIDEO_ID,
    image_start_token_id=START_ID,
    image_end_token_id=END_ID,
    video_start_token_id=294,
    video_end_token_id=295,
)


def _text(**changes: Any) -> dict[str, Any]:
    return _TEXT | changes


def _rope(**keys: Any) -> dict[str, Any]:
    return {"rope_parameters": dict(rope_type="default", rope_theta=10000.0, **keys)}


_INTERLEAVED = _rope(mrope_section=[4, 2, 2], mrope_interleaved=True)
_DELTA_ROPE = _rope(partial_rotary_factor=0.25, mrope_section=[2, 1, 1], mrope_interleaved=True)
_GLM_ROPE = _rope(partial_rotary_factor=0.5, mrope_section=[2, 1, 1])

# family: class of its configuration, the configuration's keys, kind of processor
_FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen2_vl": (
        "Qwen2VLConfig",
        dict(
            text_config=_text(**_rope(mrope_section=[2, 3, 3])),
            vision_config=dict(
                depth=2,
                embed_dim=32,
                hidden_size=64,
                num_heads=2,
                mlp_ratio=2,
                patch_size=4,
                spatial_merge_size=2,
                temporal_patch_size=2,
            ),
            **_QWEN_IDS,
        ),
        "qwen",
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        dict(
            text_config=_text(**_rope(mrope_section=[2, 3, 3])),
            vision_config=dict(
                depth=2,
                hidden_size=32,
                intermediate_size=64,
                num_heads=2,
                out_hidden_size=64,
                patch_size=4,
                fullatt_block_indexes=[1],
                window_size=16,
            ),
            **_QWEN_IDS,
        ),
        "qwen",
    ),
    "qwen3_vl": (
        "Qwen3VLConfig",
        dict(text_config=_text(head_dim=16, **_INTERLEAVED), vision_config=_DEEPSTACK, **_QWEN_IDS),
        "qwen",
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeConfig",
        dict(
            text_config=_text(
                head_dim=16,
                **_EXPERTS | dict(moe_intermediate_size=48),
                decoder_sparse_step=1,
                norm_topk_prob=True,
                **_INTERLEAVED,
            ),
            vision_config=_DEEPSTACK,
            **_QWEN_IDS,
        ),
        "qwen",
    ),
    "qwen3_5": (
        "Qwen3_5Config",
        dict(text_config=_text(head_dim=32, **_DELTA, **_DELTA_ROPE), vision_config=_QWEN3_TOWER, **_QWEN_IDS),
        "qwen",
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeConfig",
        dict(
            text_config=_text(head_dim=32, **_DELTA, **_EXPERTS, shared_expert_intermediate_size=48, **_DELTA_ROPE),
            vision_config=_QWEN3_TOWER,
            **_QWEN_IDS,
        ),
        "qwen",
    ),
    "internvl": (
        "InternVLConfig",
        dict(
            text_config=_text(model_type="qwen2", **_rope()),
            vision_config=_INTERN_TOWER,
            image_token_id=IMAGE_ID,
            image_seq_length=4,
        ),
        "intern",
    ),
    "internvl_qwen3": (
        "InternVLConfig",
        dict(
            text_config=_text(model_type="qwen3", head_dim=16, **_rope()),
            vision_config=_INTERN_TOWER,
            image_token_id=IMAGE_ID,
            image_seq_length=4,
        ),
        "intern",
    ),
    "glm4v": (
        "Glm4vConfig",
        dict(text_config=_text(head_dim=16, **_GLM_ROPE), vision_config=_GLM_TOWER, **_GLM_IDS),
        "glm",
    ),
    "glm4v_moe": (
        "Glm4vMoeConfig",
        dict(
            text_config=_text(head_dim=16, attention_bias=True, use_qk_norm=False, **_GLM_EXPERTS, **_GLM_ROPE),
            vision_config=_GLM_TOWER,
            **_GLM_IDS,
        ),
        "glm",
    ),
    "llama4": (
        "Llama4Config",
        dict(
            text_config=_text(
                head_dim=16,
                intermediate_size_mlp=96,
                num_local_experts=4,
                num_experts_per_tok=1,
                interleave_moe_layer_step=1,
                use_qk_norm=True,
                attention_chunk_size=64,
                **_rope(),
            ),
            vision_config=dict(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=128,
                image_size=336,
                patch_size=84,
                vision_output_dim=32,
                projector_input_dim=32,
                projector_output_dim=32,
                pixel_shuffle_ratio=0.5,
                vision_feature_select_strategy="default",
            ),
            image_token_index=IMAGE_ID,
            boi_token_index=START_ID,
            eoi_token_index=END_ID,
        ),
        "llama",
    ),
}
_TOKENS = {"qwen": _QWEN, "intern": _INTERN, "glm": _GLM, "llama": _LLAMA}
_PROCESSORS = {  # of model types
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
    "qwen3_vl_moe": "Qwen3VLProcessor",
    "qwen3_5": "Qwen3VLProcessor",
    "qwen3_5_moe": "Qwen3VLProcessor",
    "internvl": "InternVLProcessor",
    "internvl_qwen3": "InternVLProcessor",
    "glm4v": "Glm4vProcessor",
    "glm4v_moe": "Glm4vProcessor",
    "llama4": "Llama4Processor",
}
VISION_FAMILIES = tuple(_FAMILIES)


def vision_tokenizer(family: str = "qwen2_5_vl") -> PreTrainedTokenizerFast:
    """Return the tokenizer of a family: ChatML, words w0 to w281, and placeholders from id 290 on."""
    kind = _FAMILIES[family][2]
    image, placeholders = _TOKENS[kind]
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unk|>"]
    words = control + [f"w{i}" for i in range(NUM_WORDS)] + ["user", "assistant", "system", "\n", *placeholders.split()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    named = {"extra_special_tokens": _NAMED} if kind == "intern" else {}
    special = [token for token in ["<|im_start|>", *placeholders.split()] if token not in named.values()]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|unk|>",
        additional_special_tokens=special,
        chat_template=_TEMPLATE.replace("IMAGE", image).replace("VIDEO", image.replace("image", "video")),
        **named,
    )


def vision_config(family: str, **changes: Any) -> PretrainedConfig:
    """Return a configuration of a family (`_tied` after its name: input and output embeddings are one matrix).

    Args:
        family: one of `VISION_FAMILIES`, with or without `_tied`.
        changes: other values of keys of the language model's configuration.
    """
    name, keys, _ = _FAMILIES[family.removesuffix("_tied")]
    keys = copy.deepcopy(keys)
    keys["text_config"] |= changes | {"tie_word_embeddings": family.endswith("_tied")}
    return getattr(transformers, name)(**keys, tie_word_embeddings=family.endswith("_tied"))


def vision_checkpoint(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """Save a tiny random multimodal checkpoint with tokenizer, image processor and generation config; return `folder`.

    Args:
        folder: where to; it is made.
        family: one of `VISION_FAMILIES`, with or without `_tied`.
        seed: of the weights.
        changes: other values of keys of the language model's configuration.
    """
    torch.manual_seed(seed)
    # mcore-bridge registers its own for all models of the process, which transformers' configurations do not fit.
    ROPE_INIT_FUNCTIONS.pop("default", None)
    config = vision_config(family, **changes)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # neither ones nor zeros: a mix-up must show
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif parameter.ndim > 1 and any(part in name for part in ("visual", "vision", "project")):
                parameter.normal_(0, 0.15)  # the initialization of vision towers is too small to matter
    model.should_save_on_this_rank = lambda is_main_process: True  # transformers 5.19 would write in rank 0 only
    model.save_pretrained(folder)
    if family.removesuffix("_tied") == "qwen3_vl_moe":
        _transpose_experts(folder / "model.safetensors")
    save_vision_processor(folder, family)
    return folder


@functools.cache
def tiny_vision_checkpoint(family: str, seed: int = 0, **changes: Any) -> Path:
    """Return a folder of `vision_checkpoint`, made once a session; the same arguments give the same weights."""
    return vision_checkpoint(Path(tempfile.mkdtemp(prefix=f"tiny-{family}-")), family, seed, **changes)


def save_vision_processor(folder: Path, family: str) -> None:
    """Save the files of a family's tokenizer and processor into `folder`."""
    family = family.removesuffix("_tied")
    kind = _FAMILIES[family][2]
    tokenizer = vision_tokenizer(family)
    tokenizer.save_pretrained(folder)
    names: dict[str, Any] = {"processor_class": _PROCESSORS[family]}
    if kind == "llama":  # its image processor exists with torchvision alone
        size = {"height": 336, "width": 336}
        image_keys = {"image_processor_type": "Llama4ImageProcessorFast", "size": size, "max_patches": 4}
        names |= {"patch_size": 84, "pixel_shuffle_ratio": 0.5}
    else:
        _image_processor(kind).save_pretrained(folder)
        image_keys = json.loads((folder / "preprocessor_config.json").read_text())
    if kind == "intern":
        names |= {"image_seq_length": 4}
    image_keys["processor_class"] = names["processor_class"]
    (folder / "preprocessor_config.json").write_text(json.dumps(image_keys, indent=2))
    (folder / "processor_config.json").write_text(json.dumps(names, indent=2))


def vision_processor(family: str, image_processor: Any = None) -> Any:
    """Return transformers' own processor of a family, for images and text: video processors need torchvision.

    Args:
        family: one of `VISION_FAMILIES`.
        image_processor: its part for images; None: the family's in Pillow form.
    """
    tokenizer = vision_tokenizer(family)
    kind = _FAMILIES[family][2]
    cls = getattr(transformers, _PROCESSORS[family])

    class WithoutVideo(cls):
        def check_argument_for_proper_class(self, name, argument):
            return None if argument is None else super().check_argument_for_proper_class(name, argument)

    options = {"image_seq_length": 4} if kind == "intern" else {}
    return WithoutVideo(
        image_processor=image_processor or _image_processor(kind),
        tokenizer=tokenizer,
        video_processor=None,
        chat_template=tokenizer.chat_template,
        **options,
    )


def _image_processor(kind: str) -> Any:
    match kind:
        case "qwen":
            size = dict(shortest_edge=64, longest_edge=64 * 64)
            return Qwen2VLImageProcessorPil(patch_size=4, temporal_patch_size=2, merge_size=2, size=size)
        case "glm":
            size = dict(shortest_edge=128, longest_edge=2 * 64 * 64)  # two frames of them
            return Glm4vImageProcessorPil(patch_size=4, temporal_patch_size=2, merge_size=2, size=size)
        case "intern":
            return GotOcr2ImageProcessorPil(size=dict(height=16, width=16), min_patches=1, max_patches=4)
    raise ValueError(f"{kind}: the image processor exists with torchvision alone")


def _transpose_experts(file: Path) -> None:
    """Write experts as released checkpoints have them; a model that was never loaded is saved transposed."""
    from safetensors.torch import load_file, save_file

    tensors = {
        name: tensor.transpose(1, 2).contiguous() if "experts" in name else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})


def write_image(folder: Path, height: int = 16, width: int = 24, seed: int = 0) -> Path:
    """Write a PNG file of random pixels into `folder`, once for the same arguments, and return its path."""
    path = folder / f"{height}x{width}-{seed}.png"
    if not path.exists():
        pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return path


def image_row(folder: Path, *sizes: tuple[int, int], text: str = "w1 w2", response: str = "w3 w4", seed: int = 0):
    """Return a row of a conversation with an image of each (height, width), each followed by `text`.

    Args:
        folder: where the images are written.
        sizes: of the images; none for a row of text alone, as a string.
        text: words after each image.
        response: of the assistant.
        seed: of the first image; the others follow.
    """
    content: list[dict[str, Any]] = []
    for index, (height, width) in enumerate(sizes):
        content.append({"type": "image", "image": str(write_image(folder, height, width, seed + index))})
        content.append({"type": "text", "text": text})
    user = {"role": "user", "content": content or text}
    return {"messages": [user, {"role": "assistant", "content": response}]}
