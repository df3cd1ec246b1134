import pytest

from megatron_gkd.config.checks import attention


@pytest.fixture
def engine(monkeypatch):
    """`engine(present)`: whether Transformer Engine is installed."""
    return lambda present: monkeypatch.setattr(attention, "has_transformer_engine", lambda: present)


def test_unfused_attention_is_refused(workspace):
    assert workspace.problems("--attention_backend", "unfused") == [
        "train.attention_backend = unfused: must be one of auto, flash, fused, sdpa"
    ]


@pytest.mark.parametrize("attn", ["flash", "fused"])
def test_attention_for_16_bits_is_refused_with_fp32(attn, workspace, engine):
    engine(True)
    assert workspace.problems("--attention_backend", attn, "--dtype", "fp32") == [
        f"train.attention_backend = {attn}: needs dtype = bf16; with dtype = fp32 it must be auto or sdpa"
    ]
    assert workspace.problems("--attention_backend", attn) == []


@pytest.mark.parametrize("attn", ["flash", "fused"])
def test_attention_of_transformer_engine_is_refused_without_it(attn, workspace, engine):
    engine(False)
    (problem,) = workspace.problems("--attention_backend", attn)
    assert problem.startswith(
        f"train.attention_backend = {attn}: needs Transformer Engine, which is not installed here (pip install "
    )
    assert workspace.problems("--attention_backend", attn, require_paths=False) == [], "another machine may have it"


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("attn", ["auto", "sdpa"])
def test_other_attention_is_accepted_everywhere(attn, dtype, workspace, engine):
    for present in (True, False):
        engine(present)
        assert workspace.problems("--attention_backend", attn, "--dtype", dtype) == []
