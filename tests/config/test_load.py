import pytest

from megatron_gkd.config.errors import RecipeError
from megatron_gkd.config.load import load
from megatron_gkd.errors import UserError


def test_the_documented_recipe_loads_as_it_stands(workspace):
    recipe = workspace.load()
    assert recipe.student.model == "student"
    assert recipe.teacher.source == "local" and recipe.teacher.offload_teacher_model is True
    assert recipe.parallel.sequence_parallel is True
    assert [(entry.path, entry.weight) for entry in recipe.data.dataset] == [("train.jsonl", 1.0)]
    assert recipe.train.train_iters == 20 and recipe.train.lr == 1e-4
    assert recipe.output.save_interval == 10


def test_defaults(workspace):
    workspace.recipe.write_text(
        "student: {model: student}\nteacher: {teacher_model: teacher}\ndistill:\n"
        "data: {dataset: train.jsonl}\ntrain: {num_train_epochs: 1.5}\noutput: {output_dir: out}\n"
    )
    recipe = workspace.load(world_size=8)
    assert (recipe.distill.beta, recipe.distill.lmbda, recipe.distill.temperature) == (0.5, 0.0, 0.9)
    assert (recipe.train.adam_beta1, recipe.train.adam_beta2, recipe.train.dtype) == (0.9, 0.95, "bf16")
    assert recipe.parallel.distributed_optimizer is True
    assert recipe.data.max_length == 2048 and recipe.data.val_dataset == ()


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", ".1e-3", "0.0001", "'1e-4'", "+1e-4"])
def test_floats_that_yaml_1_1_reads_as_text(workspace, text):
    workspace.recipe.write_text(workspace.recipe.read_text().replace("1.0e-4", text))
    assert workspace.load().train.lr == 1e-4


def test_all_problems_are_reported_at_once(workspace):
    workspace.recipe.write_text(
        workspace.recipe.read_text().replace("beta: 0.5", "beta: 1.5").replace("lr:", "lrr: 1, min_lr: -1, lr:")
    )
    assert workspace.problems("--temperature", "0", "--dataset", "none.jsonl", "--dtype", "fp16", world_size=3) == [
        "train.lrr: unknown key; did you mean train.lr?",
        "distill.beta = 1.5: must be a number in [0, 1]",
        "distill.temperature = 0: must be a number in [0.01, 1000.0]",
        "train.min_lr = -1: must be a number >= 0",
        "train.dtype = fp16: must be one of bf16, fp32",
        "parallel.tensor_model_parallel_size x pipeline_model_parallel_size x context_parallel_size = 2 x 1 x 1 = 2: "
        "must divide the number of processes (3)",
        "data.dataset = none.jsonl: must be a file or folder that exists",
    ]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("train_iters", "train_itres", "train.train_itres: unknown key; did you mean train.train_iters?"),
        ("train_iters: 20", "train_iters: 20, beta: 1", "train.beta: unknown key; beta belongs in the section distill"),
        ("distill:", "beta: 1\ndistill:", "beta: unknown key; beta belongs in the section distill"),
        ("distill:", "distil: {}\ndistill:", "distil: unknown section; did you mean distill?"),
        ("beta: 0.5", "zzz: 1", "distill.zzz: unknown key; the keys of distill are divergence, beta, lmbda, "
         "lmbda_granularity, temperature, sft_alpha, gkd_logits_topk, gkd_topk_tail, loss_chunk_tokens"),
        ("{model: student}", "{modle: student}", "student.modle: unknown key; did you mean student.model?"),
        ("{model: student}", "{}", "student.model: missing; must be a text (the student: a local Hugging Face "
         "directory or a hub id)"),
        ("{model: student}", "student", "student = student: must be a mapping with the keys model, model_revision, "
         "use_hf, trust_remote_code"),
        ("{model: student}", "{model: 7}", "student.model = 7: must be a text"),
        ("{model: student}", "{model: ''}", "student.model = '': must be a text"),
        ("packing: false", "packing: maybe", "data.packing = maybe: must be true or false"),
        ("max_length: 512", "max_length: true", "data.max_length = true: must be an integer >= 2"),
        ("max_length: 512", "max_length: 1.5", "data.max_length = 1.5: must be an integer >= 2"),
        ("lr: 1.0e-4", "lr: .nan", "train.lr = nan: must be a number > 0"),
        ("lr: 1.0e-4", "lr: .inf", "train.lr = inf: must be a number > 0"),
        ("dataset: [train.jsonl]", "dataset: [{path: train.jsonl, wieght: 2}]", "data.dataset = [{'path': "
         "'train.jsonl', 'wieght': 2}]: must be a list of paths or {path, weight} with weight > 0"),
        ("dataset: [train.jsonl]", "dataset: []", "data.dataset = []: must be a list of paths or {path, weight} with "
         "weight > 0"),
        ("save_interval: 10", "save_interval: 0", "output.save_interval = 0: must be an integer >= 1, or null"),
    ],
)  # fmt: skip
def test_one_mistake_is_one_line(workspace, old, new, problem):
    text = workspace.recipe.read_text()
    assert old in text
    workspace.recipe.write_text(text.replace(old, new, 1))
    assert workspace.problems() == [problem]


def test_a_dataset_may_stand_alone_or_with_a_weight(workspace):
    workspace.recipe.write_text(
        workspace.recipe.read_text()
        .replace("{dataset: [train.jsonl]", "{dataset: train.jsonl")
        .replace("[val.jsonl]", "{path: val.jsonl, weight: 1e-1}")
    )  # fmt: skip
    data = workspace.load().data
    assert [entry.path for entry in data.dataset] == ["train.jsonl"]
    assert [(entry.path, entry.weight) for entry in data.val_dataset] == [("val.jsonl", 0.1)]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("student: [", "not YAML: line 1: "),
        ("train: {lr: 1}\ntrain: {lr: 2}\n", "not YAML: line 2: the key 'train' occurs twice"),
        ("just words", "must hold the sections student, teacher"),
        ("", "must hold the sections student, teacher"),
        ("a: \x00", "not YAML: "),
    ],
)
def test_files_that_are_no_recipe(workspace, text, problem):
    workspace.recipe.write_text(text)
    (found,) = workspace.problems()
    assert found.startswith(problem)
    assert "\n" not in found


def test_a_missing_file(tmp_path):
    with pytest.raises(RecipeError) as error:
        load(tmp_path / "none.yaml", world_size=1)
    assert error.value.problems == ["can't be read: No such file or directory"]
    assert isinstance(error.value, UserError)
