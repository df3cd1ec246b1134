"""The command plan: refusals in one line, tables, JSON, suggestions. The measurement is replaced by costs by hand."""

import json
import sys
import types

import pytest
from planning.handmade import FORWARD, GIB, STUDENT, TEACHER, rank, traffic
from recipe_workspace import DENSE, Workspace
from terminal import Terminal

from megatron_gkd import cli
from megatron_gkd.errors import UserError

CACHE = ("--teacher_model=null", "--offload_teacher_model=false", "--teacher_cache", "scores")


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return Workspace(tmp_path)


@pytest.fixture
def measured(monkeypatch):
    """Replace the measurement; the calls are recorded."""
    module, calls = types.ModuleType("megatron_gkd.planning.measurement"), []

    def measure(recipe, world_size, options=None):
        calls.append((recipe, world_size, options))
        print("a line that a library prints")
        links = (traffic("student", "tp", 2, "all_gather", GIB, 8), traffic("update", "dp", 8, "reduce_scatter", GIB))
        stages = range(recipe.parallel.pipeline_model_parallel_size)
        return [rank(stage, traffic=links, notes=("Something is left out.",)) for stage in stages]

    module.measure = measure
    monkeypatch.setitem(sys.modules, "megatron_gkd.planning.measurement", module)
    monkeypatch.delitem(sys.modules, "megatron_gkd.planning.run", raising=False)
    yield calls
    sys.modules.pop("megatron_gkd.planning.run", None)


def plan(*arguments):
    return cli.main(["plan", "recipe.yaml", *arguments])


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        ([], ["--gpus: missing; must be an integer >= 1 (GPUs, one process each)"]),
        (["--gpus", "0"], ["--gpus = 0: must be an integer >= 1"]),
        (["--gpus", "12"], ["--gpus = 12: must be a multiple of --nodes-of (8), or fewer"]),
        (["--gpus", "3"], ["must divide the number of processes (3)"]),
        (["--gpus", "16", "--gpu-memory", "80"], ["--gpu-memory = 80: must be memory (as 80GB, "]),
        (["--gpus", "16", "--gpu-memory", "80XB"], ["--gpu-memory = 80XB: must be memory (as 80GB, "]),
        (["--gpus", "16", "--device", "h1"], ["--device = h1: unknown; must be a100, h100, "]),
        (["--gpus", "16", "--device", "no.yaml"], ["--device = no.yaml: can't be read: No such file or directory"]),
        (["--gpus", "16", "--suggest", "none"], ["--suggest = none: must be an integer >= 1, or nothing"]),
        (["--gpus", "16", "--mfu", "2"], ["--mfu = 2: must be a number in (0, 1]"]),
        (["--gpus", "16", "--expert-imbalance", "inf"], ["--expert-imbalance = inf: must be a number >= 1"]),
        (
            ["--gpus", "16", "--tensor_model_parallel_size", "16"],
            ["must divide the 8 attention heads of student.model"],
        ),
        (
            ["--gpus", "16", "--offload_model"],
            ["memory.offload_model = true: only with rollout.engine = vllm; megatron "],
        ),
        (
            ["--gpus", "16", "--lmbda", "1", "--gkd_logits_topk", "5", *CACHE],
            ["distill.lmbda = 1.0: must be 0 with teacher.teacher_cache alone"],
        ),
        (["--gpus", "16", "--bta", "1"], ["--bta: unknown key; did you mean distill.beta?"]),
    ],
)
def test_mistakes_are_one_line_each(workspace, measured, capsys, arguments, lines):
    code, printed = plan(*arguments), capsys.readouterr()
    assert code == 2 and not measured and "Traceback" not in printed.err
    assert all(any(line in one for one in printed.err.splitlines()) for line in lines), printed.err


def test_nothing_but_the_configurations_is_needed(workspace, measured, capsys):
    (workspace.folder / "train.jsonl").unlink()
    (workspace.folder / "val.jsonl").unlink()
    overrides = ["--engine", "vllm", "--lmbda", "1", "--output_dir", "/proc/nowhere", "--attention_backend", "flash"]
    assert plan("--gpus", "16", *overrides) == 0, capsys.readouterr().err
    ((recipe, gpus, options),) = measured
    assert gpus == 16 and recipe.rollout.engine == "vllm" and options.expert_imbalance == 1.5


def test_options_reach_the_measurement_and_the_plan(workspace, measured, capsys):
    arguments = ["--gpus", "16", "--json", "--label-fraction", "0.5", "--expert-imbalance", "2", "--mfu", "0.3"]
    arguments += ["--reserve", "1GiB", "--bandwidth-efficiency", "0.9", "--gpu-memory", "40GiB", "--nodes-of", "4"]
    assert plan(*arguments) == 0
    options = measured[0][2]
    assert (options.label_fraction, options.expert_imbalance) == (0.5, 2)
    tree = json.loads(capsys.readouterr().out)
    assumed = tree["assumptions"]
    assert (assumed["reserve"], assumed["mfu"], assumed["bandwidth_efficiency"]) == (GIB, 0.3, 0.9)
    assert tree["cluster"]["gpus_per_node"] == 4 and tree["cluster"]["gpu_memory"] == 40 * GIB


def test_the_tables(workspace, measured, capsys):
    assert plan("--gpus", "16", "--pipeline_model_parallel_size", "2") == 0
    text = capsys.readouterr().out
    for expected in (
        "estimates, not compared with GPUs",
        "16 processes = tensor 2 x context 1 x pipeline 2 x data 4",
        "Memory of a GPU in each phase, GiB (of the pipeline stage that needs most)",
        "Memory of a GPU of each pipeline stage, GiB",
        "0-1",
        "Communication of a GPU in a step, GiB that it sends",
        "Time of a step, seconds (estimate)",
        "Fits: at most 38.0 of 74.5 GiB, with the reserve.",
        "No figure here was compared with a GPU.",
        "Something is left out.",
    ):
        assert expected in text, expected
    lines = text.splitlines()
    assert next(line for line in lines if line.strip().startswith("teacher weights")).split()[2:] == [
        "20.0",
        "1.00",
        "1.00",
        "1.00",
    ]


def test_tables_are_drawn_on_a_terminal(workspace, measured, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    assert plan("--gpus", "16") == 0
    assert "┃" in terminal.getvalue() or "│" in terminal.getvalue()


def test_json_has_stable_names_and_nothing_else_on_stdout(workspace, measured, capsys):
    assert plan("--gpus", "16", "--json") == 0
    tree = json.loads(capsys.readouterr().out)
    assert list(tree) == [
        *("recipe", "schema_version", "is_estimate", "cluster", "assumptions", "layout", "fits", "peak", "memory"),
        *("host_memory_of_a_node", "communication", "rollouts", "time", "shortfalls", "costs", "not_counted"),
    ]
    assert (tree["recipe"], tree["schema_version"], tree["fits"]) == ("recipe.yaml", 1, True)
    phase = tree["memory"][0]["phases"][0]
    assert phase["phase"] == "teacher" and phase["total"] == sum(phase["parts"].values())
    assert phase["free"] == tree["cluster"]["gpu_memory"] - phase["total"]
    (tp, dp) = tree["communication"][0]["links"]
    assert (tp["link"], tp["sent"], tp["operations"], tp["network"]) == ("tp", 4 * GIB, 8, 0)
    assert (dp["link"], dp["nodes"]) == ("dp", 2)
    assert tree["time"]["step"] == pytest.approx(sum(one["total"] for one in tree["time"]["phases"]))
    assert tree["costs"][0]["student"]["parameters"] == STUDENT.parameters


def test_what_does_not_fit_is_in_the_json(workspace, measured, capsys):
    assert plan("--gpus", "16", "--json", "--gpu-memory", "20GiB") == 0
    tree = json.loads(capsys.readouterr().out)
    one = tree["shortfalls"][0]
    assert not tree["fits"] and one["phase"] == "teacher" and one["over"] == (38 - 20) * GIB
    assert one["remedies"] and set(one["remedies"][0]) == {"settings", "reason"}


def test_suggestions_are_printed_and_in_the_json(workspace, measured, capsys, monkeypatch):
    monkeypatch.setattr("megatron_gkd.planning.measuring_pool.MeasuringPool", Pool)
    assert plan("--gpus", "16", "--suggest", "2", "--measure-at-most", "6") == 0
    text = capsys.readouterr().out
    assert "Suggestions (estimates; 6 variants measured" in text and "As overrides of the recipe" in text
    sys.modules.pop("megatron_gkd.planning.run")
    assert plan("--gpus", "16", "--suggest", "--json") == 0
    tree = json.loads(capsys.readouterr().out)
    assert 0 < len(tree["suggestions"]) <= 5
    assert set(tree["suggestions"][0]) == {"settings", "overrides", "peak", "step", "tokens_per_second"}
    assert tree["layouts_measured"] <= 30


class Pool:
    def __init__(self, options):
        self.options = options

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def measure(self, recipes, world_size):
        for recipe in recipes:
            stages = range(recipe.parallel.pipeline_model_parallel_size)
            yield [rank(stage, student=STUDENT, teachers={"teacher": TEACHER}) for stage in stages]


def test_a_model_of_the_hub_needs_its_configuration_alone(workspace, measured, capsys, monkeypatch):
    downloaded = []

    def download(model, file, revision=None):
        downloaded.append((model, file))
        if model == "org/none":
            raise OSError("no such repository")
        return str(workspace.folder / "student" / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.delitem(sys.modules, "megatron_gkd.planning.model_folders", raising=False)
    assert plan("--gpus", "16", "--model", "org/student") == 0
    assert downloaded == [("org/student", "config.json")]
    assert measured[0][0].student.model == str(workspace.folder / "student")
    sys.modules.pop("megatron_gkd.planning.run")
    assert plan("--gpus", "16", "--teacher_model", "org/none") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("teacher.teacher_model = org/none: its config.json can't be downloaded (OSError: no such")
    sys.modules.pop("megatron_gkd.planning.run")
    workspace.model("student", {**DENSE, "num_attention_heads": 6, "num_key_value_heads": 2})
    overrides = ("--tensor_model_parallel_size", "4")
    assert plan("--gpus", "16", "--model", "org/student", *overrides) == 2, (
        "checks of a model are made once it is known"
    )
    assert "must divide the 6 attention heads" in capsys.readouterr().err
    sys.modules.pop("megatron_gkd.planning.model_folders")


def test_what_a_model_refuses_is_one_line(workspace, measured, capsys, monkeypatch):
    def refuse(recipe, world_size, options):
        raise UserError("student.model: its layers are unknown")

    sys.modules["megatron_gkd.planning.measurement"].measure = refuse
    assert plan("--gpus", "16") == 2
    assert capsys.readouterr().err == "student.model: its layers are unknown\n"


def test_help_lists_the_options(capsys):
    assert cli.main(["plan", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--gpus  an integer >= 1  [required]" in text and "--nproc" not in text.split("options of plan")[1]


def test_the_figures_by_hand_are_of_one_rank():
    assert FORWARD.peak == FORWARD.kept * FORWARD.in_flight + FORWARD.transient
