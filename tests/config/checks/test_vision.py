"""Keys of multimodal students: what goes together, and what the student and the layout must be."""

import pytest
from recipe_workspace import DENSE, VISION

from megatron_gkd.config.vision_rules import frozen_parts

TRAINED = "--freeze_vit false --freeze_aligner false"


@pytest.mark.parametrize(
    ("flags", "frozen"),
    [("", {"vit", "aligner"}), (TRAINED, set()), ("--freeze_llm true --freeze_vit false", {"aligner", "llm"})],
)
def test_what_is_frozen(workspace, flags, frozen):
    workspace.model("student", VISION)
    workspace.model("teacher", VISION)
    assert frozen_parts(workspace.load(*flags.split()).train) == frozen


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--freeze_llm true", "train.freeze_llm = true: at least one part must be trained; set freeze_vit = false or "
         "freeze_aligner = false, or freeze_llm = false"),
        ("--vit_lr 0.1", "train.vit_lr = 0.1: this part is not trained; set freeze_vit = false, or leave it out"),
        ("--aligner_lr 0.1 --freeze_vit false", "train.aligner_lr = 0.1: this part is not trained; set freeze_aligner "
         "= false, or leave it out"),
        ("--pipeline_model_parallel_size 4 --tensor_model_parallel_size 1 --sequence_parallel false",
         "parallel.pipeline_model_parallel_size = 4: gives the first stage 2 of 8 layers; must give it the 3 layers to "
         "which student.model (student) adds features of images"),
        ("--pipeline_model_parallel_size 2 --virtual_pipeline_model_parallel_size 2 --tensor_model_parallel_size 2",
         "parallel.pipeline_model_parallel_size x virtual_pipeline_model_parallel_size = 4: gives the first stage 2 of "
         "8 layers; must give it the 3 layers to which student.model (student) adds features of images"),
    ],
)  # fmt: skip
def test_what_is_refused(workspace, flags, problem):
    workspace.model("student", VISION)
    assert workspace.problems(*flags.split(), world_size=4) == [problem]


def test_a_teacher_needs_layers_in_the_first_stage_too(workspace):
    workspace.model("teacher", VISION)
    flags = "--pipeline_model_parallel_size 4 --tensor_model_parallel_size 1 --sequence_parallel false"
    (problem,) = workspace.problems(*flags.split(), world_size=4)
    assert problem.endswith(
        "must give it the 3 layers to which teacher.teacher_model (teacher) adds features of images"
    )


@pytest.mark.parametrize(
    "flag", ["--freeze_vit true", "--vit_lr 0.1 --freeze_vit false", "--vit_gradient_checkpointing true"]
)
def test_a_text_student_has_no_such_keys(workspace, flag):
    workspace.model("student", DENSE)
    problems = workspace.problems(*flag.split())
    assert problems and all(
        "only with a student that reads images; student does not" in problem for problem in problems
    )
