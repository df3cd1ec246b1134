"""The gradient of Qwen3-VL's vision tower under sequence parallelism, on mcore-bridge's own model."""

from __future__ import annotations

import torch

IMAGE = 90
TOKENS = dict(image_token_id=IMAGE, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93)


def write_checkpoint(path):
    from transformers import AutoModelForImageTextToText, Qwen3VLConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    ROPE_INIT_FUNCTIONS.pop("default", None)
    torch.manual_seed(0)
    text = dict(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters=dict(
            rope_type="default", rope_theta=10000.0, mrope_section=[4, 2, 2], mrope_interleaved=True
        ),
    )  # fmt: skip
    vision = dict(
        depth=3,
        hidden_size=16,
        intermediate_size=32,
        num_heads=2,
        out_hidden_size=32,
        patch_size=4,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 1],
    )
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **TOKENS)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # the default is so small that nothing would be seen
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(path)


def vision_gradients(rank, world_size, path, is_repaired):
    """Return the gradients of the tower for the squared hidden states of one row with an image in the middle."""
    from transformers import AutoConfig

    from megatron_gkd.models.repairs import repair
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh

    from mcore_bridge import ModelConfig, get_mcore_model, hf_to_mcore_config
    from megatron.core.packed_seq_params import PackedSeqParams

    is_split = world_size > 1
    initialize_mesh(Layout(tensor=world_size, sequence_parallel=is_split), seed=1)
    config = ModelConfig(
        params_dtype=torch.float32,
        tensor_model_parallel_size=world_size,
        sequence_parallel=is_split,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        variable_seq_lengths=True,
        **hf_to_mcore_config(AutoConfig.from_pretrained(path)),
    )
    (chunk,) = get_mcore_model(config)
    if is_repaired:
        repair(chunk, config)
    config.bridge.load_weights([chunk], str(path))
    chunk.language_model.output_layer.forward = lambda hidden, *args, **options: (hidden, None)
    torch.manual_seed(3)
    ids = torch.tensor([[3, 4, 92, *[IMAGE] * 8, 93, 5, 6, 7, 8]])
    boundaries = torch.tensor([0, ids.shape[1]], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=ids.shape[1],
        max_seqlen_kv=ids.shape[1],
    )
    hidden = chunk(
        ids,
        torch.arange(ids.shape[1]).expand(3, 1, -1),
        None,
        packed_seq_params=packed,
        pixel_values=torch.randn(32, 3 * 2 * 4 * 4),
        image_grid_thw=torch.tensor([[1, 4, 8]]),
    )
    (hidden**3).sum().backward()
    gradients = {name: parameter.grad for name, parameter in chunk.visual.named_parameters()}
    destroy_mesh()
    return gradients


def largest_error(found, expected):
    return max(float((found[name] - gradient).norm() / gradient.norm()) for name, gradient in expected.items())


def test_every_rank_has_the_whole_gradient_with_the_repair_alone(gloo_world, tmp_path):
    write_checkpoint(tmp_path)
    (expected,) = gloo_world(1).run(vision_gradients, tmp_path, True)
    assert all(gradient is not None and gradient.norm() > 0 for gradient in expected.values())
    for found in gloo_world(2).run(vision_gradients, tmp_path, True):
        assert largest_error(found, expected) < 1e-4
    for found in gloo_world(2).run(vision_gradients, tmp_path, False):
        assert largest_error(found, expected) > 1e-2
