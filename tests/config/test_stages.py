"""The layers of pipeline stages, compared with those that Megatron-Core builds, and the layouts that are refused."""

from types import SimpleNamespace

import pytest

from megatron_gkd.config.stages import Stages

SPLITS = [
    (Stages(), 8, 4, None),
    (Stages(), 8, 2, 2),
    (Stages(first=3), 4, 2, None),
    (Stages(last=1), 10, 4, None),
    (Stages(first=1, last=1), 8, 4, None),
    (Stages(first=4), 6, 2, 2),
    (Stages(first=4, last=2), 14, 4, 2),
    (Stages(layout="Et|tt|t|L"), 4, 4, None),
    (Stages(layout="E,t*3|(tt|)*2,L"), 7, 4, None),
    (Stages(layout="Ett|t|t|ttL"), 6, 2, 2),
    (Stages(layout="E(t|)*3tL"), 4, 2, 2),
]


@pytest.mark.parametrize(("stages", "num_layers", "pipeline", "virtual"), SPLITS)
def test_they_are_those_of_megatron(stages, num_layers, pipeline, virtual, monkeypatch):
    import megatron_gkd.runtime.preload  # noqa: F401

    from megatron.core import parallel_state
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    monkeypatch.setattr(parallel_state, "get_virtual_pipeline_model_parallel_world_size", lambda: virtual)
    config = SimpleNamespace(
        num_layers=num_layers,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        num_layers_in_first_pipeline_stage=stages.first,
        num_layers_in_last_pipeline_stage=stages.last,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
        pipeline_model_parallel_layout=None,
    )
    layout = None if stages.layout is None else PipelineParallelLayerLayout(stages.layout, pipeline)
    if layout is not None:
        layout.validate_layer_layout(num_layers, None)

    def built(chunk: int, rank: int) -> int:
        stage = chunk if virtual else None
        if layout is not None:
            return layout.get_num_layers_to_build(LayerType.decoder, stage, rank)
        return get_num_layers_to_build(config, stage, rank)

    expected = tuple(built(chunk, rank) for chunk in range(virtual or 1) for rank in range(pipeline))
    assert stages.layers(num_layers, pipeline, virtual) == expected
    assert sum(expected) == num_layers


@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        ("Etttt|ttttL|", "has 3 stages; it must have parallel.pipeline_model_parallel_size = 2"),
        ("Et*8L", "has 1 stages; it must have parallel.pipeline_model_parallel_size = 2"),
        ("E tttt|ttttL", "  can't be read"),
        ("Ettxt|ttttL", "x can't be read; the notation has E (embedding), t (decoder layer), L (loss), | (next stage), "
         "x*n and (xy)*n, without spaces"),
        ("Ett((tt)*2|ttttL", "( can't be read"),
        ("Etttt|ttttmL", "has a layer for multi-token prediction (m), which is not trained here; leave it out"),
        ("tttt|ttttL", "must begin with the one E and end with the one L"),
        ("|EttttttttL", "must begin with the one E and end with the one L"),
        ("Etttt|Lt", "must begin with the one E and end with the one L"),
        ("EtttL|ttttL", "must begin with the one E and end with the one L"),
        ("Et*99999999999|L", "repeats something more than 10000 times"),
    ],
)  # fmt: skip
def test_layouts_that_no_model_has(layout, problem):
    (found,) = Stages(layout=layout).problems(2, None)
    assert problem in found.text and found.leaf == "pipeline_model_parallel_layout"


@pytest.mark.parametrize(
    ("layout", "virtual", "text"),
    [
        ("Ett||tt|L", None, "stage 2 has no decoder layer (t); every stage but the first and the last needs one"),
        ("E|t|t|t|t|t|t|tL", 2, "stage 1 has no decoder layer (t); every stage needs one"),
    ],
)
def test_stages_without_layers(layout, virtual, text):
    """mcore-bridge takes the head for that of the last chunk with layers."""
    (found,) = Stages(layout=layout).problems(4, virtual)
    assert found.text == text
