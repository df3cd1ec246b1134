"""Pipeline stages of unequal sizes that are refused, for the student and for the teacher."""

import pytest

PP = "--pipeline_model_parallel_size 2 --global_batch_size 8"
FIRST, LAST = "parallel.decoder_first_pipeline_num_layers", "parallel.decoder_last_pipeline_num_layers"
LAYOUT = "parallel.pipeline_model_parallel_layout"
MODEL = "; the model is student.model (student)"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("--decoder_first_pipeline_num_layers 3", f"{FIRST} = 3: needs parallel.pipeline_model_parallel_size > 1"),
        ("--pipeline_model_parallel_layout EttL", f"{LAYOUT} = EttL: needs parallel.pipeline_model_parallel_size > 1"),
        (f"{PP} --decoder_first_pipeline_num_layers 8",
         f"{FIRST} = 8: leaves 0 of 8 layers for 1 other pipeline ranks{MODEL}"),
        (f"{PP} --decoder_last_pipeline_num_layers 9",
         f"{LAST} = 9: leaves -1 of 8 layers for 1 other pipeline ranks{MODEL}"),
        (f"{PP} --decoder_first_pipeline_num_layers 3 --decoder_last_pipeline_num_layers 4",
         f"{FIRST} = 3: leaves 1 of 8 layers for 0 other pipeline ranks{MODEL}"),
        (f"{PP} --pipeline_model_parallel_layout Ettt|tttL",
         f"{LAYOUT} = Ettt|tttL: has 6 decoder layers (t); the model has 8{MODEL}"),
        (f"{PP} --pipeline_model_parallel_layout Ett|ttttttL --decoder_last_pipeline_num_layers 6",
         f"{LAYOUT} = Ett|ttttttL: not beside decoder_first_pipeline_num_layers and decoder_last_pipeline_num_layers; "
         "set the layout or these"),
        (f"{PP} --virtual_pipeline_model_parallel_size 2 --decoder_first_pipeline_num_layers 3",
         f"{FIRST} = 3: must be a multiple of parallel.virtual_pipeline_model_parallel_size (2)"),
        (f"{PP} --virtual_pipeline_model_parallel_size 2 --pipeline_model_parallel_layout Etttt|ttttL",
         f"{LAYOUT} = Etttt|ttttL: has 2 stages; it must have parallel.pipeline_model_parallel_size x "
         "virtual_pipeline_model_parallel_size = 4"),
        (f"{PP} --teacher_decoder_first_pipeline_num_layers 8",
         "teacher.teacher_decoder_first_pipeline_num_layers = 8: leaves 0 of 8 layers for 1 other pipeline ranks; the "
         "model is teacher.teacher_model (teacher)"),
        (f"{PP} --teacher_pipeline_model_parallel_layout EtL",
         "teacher.teacher_pipeline_model_parallel_layout = EtL: has 1 stages; it must have "
         "parallel.pipeline_model_parallel_size = 2"),
        (f"{PP} --teacher_kind self --offload_teacher_model false --teacher_model null "
         "--teacher_decoder_last_pipeline_num_layers 3",
         "teacher.teacher_decoder_last_pipeline_num_layers = 3: only with teacher.teacher_kind = local"),
    ],
)  # fmt: skip
def test_refused(workspace, arguments, problem):
    assert workspace.problems(*arguments.split(), world_size=4) == [problem]


@pytest.mark.parametrize(
    "arguments",
    [
        f"{PP} --decoder_first_pipeline_num_layers 7",
        f"{PP} --pipeline_model_parallel_layout E|t*8L",
        f"{PP} --virtual_pipeline_model_parallel_size 2 --pipeline_model_parallel_layout Ettt|tt|tt|tL",
        f"{PP} --teacher_pipeline_model_parallel_layout Et*5|tttL",
    ],
)
def test_accepted(workspace, arguments):
    assert workspace.problems(*arguments.split(), world_size=4) == []


def test_stages_need_not_divide_the_layers_of_a_model_with_keys_of_its_own(workspace):
    from recipe_workspace import DENSE

    workspace.model("student", {**DENSE, "num_hidden_layers": 7})
    assert workspace.problems(*PP.split(), world_size=4) == [
        "parallel.pipeline_model_parallel_size = 2: must divide the 7 layers of student.model (student)"
    ]
    assert workspace.problems(*PP.split(), "--decoder_first_pipeline_num_layers", "3", world_size=4) == []


def test_the_first_stage_has_the_layers_of_image_features(workspace):
    from recipe_workspace import VISION

    workspace.model("student", VISION)
    arguments = f"{PP} --tensor_model_parallel_size 2 --decoder_first_pipeline_num_layers"
    assert workspace.problems(*arguments.split(), "3", world_size=4) == []
    (problem,) = workspace.problems(*arguments.split(), "2", world_size=4)
    assert problem.startswith("parallel.pipeline_model_parallel_size = 2: gives the first stage 2 of 8 layers; must ")
