"""The options of models that are not trained, from a recipe."""

from training_layouts import recipe_of

SECTION = {
    "fp8_format": "hybrid",
    "moe_token_dispatcher_type": "allgather",
    "freeze_moe_router": True,
    "megatron_extra_kwargs": {"moe_router_fusion": True},
}


def test_a_student_that_only_scores_is_computed_as_in_training():
    from megatron_gkd.training.model_options import student_options, untrained_student_options

    recipe = recipe_of({"megatron": SECTION})
    found, trained = untrained_student_options(recipe).modules, student_options(recipe).modules
    assert (found.fp8, found.extra, found.experts) == (trained.fp8, trained.extra, trained.experts)
    assert (found.is_trained, found.freezes_routers) == (False, False)


def test_a_model_that_generates_is_not_computed_in_fp8():
    """Each of its steps has one token of a sequence."""
    from megatron_gkd.training.model_options import generating_options, teacher_options, untrained_student_options

    recipe = recipe_of({"megatron": SECTION, "teacher": {"teacher_fp8_format": "e4m3"}})
    for options in (untrained_student_options(recipe), teacher_options(recipe, "teacher", recipe.teacher)):
        assert options.modules.fp8 is not None
        assert generating_options(options).modules.fp8 is None
