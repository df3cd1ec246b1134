import os
import resource
import subprocess
import sys
import types
from pathlib import Path

import pytest
from recipe_workspace import Workspace

import megatron_gkd
from megatron_gkd import cli
from megatron_gkd.config import keys
from megatron_gkd.errors import UserError

OWN = {"score": ["--output", "x"], "generate": ["--output", "x.jsonl", "--from", "student"]}


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    return Workspace(tmp_path)


@pytest.fixture
def trainer(monkeypatch):
    """Record what `train` is called with; set `trainer.error` to make it raise."""
    module = types.ModuleType("megatron_gkd.training.run")
    module.calls, module.error = [], None

    def train(recipe):
        module.calls.append(recipe)
        if module.error:
            raise module.error

    module.train = train
    monkeypatch.setitem(sys.modules, "megatron_gkd.training", types.ModuleType("megatron_gkd.training"))
    monkeypatch.setitem(sys.modules, "megatron_gkd.training.run", module)
    return module


def run(*command):
    """Run a command in a process of its own, which finds the package from any folder."""
    environment = {**os.environ, "PYTHONPATH": str(Path(megatron_gkd.__file__).parents[1])}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def test_train_passes_the_recipe_to_the_trainer(workspace, trainer):
    assert cli.main(["train", "recipe.yaml", "--beta", "1", "--packing"]) == 0
    (recipe,) = trainer.calls
    assert recipe.distill.beta == 1.0 and recipe.data.packing is True


def test_a_wrong_recipe_is_one_line_a_problem_and_2(workspace, trainer, capsys):
    assert cli.main(["train", "recipe.yaml", "--beta", "1.5", "--lmbda", "2"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "recipe.yaml: distill.beta = 1.5: must be a number in [0, 1]",
        "recipe.yaml: distill.lmbda = 2: must be a number in [0, 1]",
    ]
    assert trainer.calls == []


def test_only_rank_0_prints_a_wrong_recipe(workspace, trainer, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["train", "recipe.yaml", "--beta", "1.5"]) == 2
    assert capsys.readouterr().err == ""


def test_the_main_rank_alone_prints_deprecated_keys(workspace, trainer, capsys, monkeypatch):
    workspace.recipe.write_text(workspace.recipe.read_text().replace("seed: 1234", "attn: auto"))
    assert cli.main(["train", "recipe.yaml", "--attn", "sdpa"]) == 0
    assert capsys.readouterr().err == "train.attn: deprecated; use train.attention_backend\n"
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["train", "recipe.yaml"]) == 0 and capsys.readouterr().err == ""


@pytest.mark.parametrize("command", ["train", "score", "generate"])
@pytest.mark.parametrize(("name", "text"), [("WORLD_SIZE", "two"), ("RANK", ""), ("LOCAL_RANK", "x"), ("RANK", "2")])
def test_the_variables_of_a_launcher_are_checked(workspace, trainer, capsys, monkeypatch, command, name, text):
    monkeypatch.setenv(name, text)
    assert cli.main([command, "recipe.yaml", *OWN.get(command, [])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name} = " in line and "must be" in line


def test_processes_are_started_only_for_a_recipe_that_fits_their_number(workspace, capsys, monkeypatch):
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    launcher = types.ModuleType("megatron_gkd.launch.launcher")
    launched = []
    launcher.launch = lambda options, command: launched.append((options, command)) or 75
    launcher.processes = lambda options: 2
    monkeypatch.setitem(sys.modules, "megatron_gkd.launch.launcher", launcher)
    assert cli.main(["train", "recipe.yaml", "--nproc", "3"]) == 2
    assert "must divide the number of processes (3)" in capsys.readouterr().err and launched == []
    nodes = ["--nnodes", "2", "--rdzv", "node0:29400"]
    assert cli.main(["train", "recipe.yaml", "--nproc", "1", *nodes, "--attn", "sdpa"]) == 75
    assert capsys.readouterr().err == "", "the ranks print what is deprecated"
    ((options, command),) = launched
    assert (options.nproc, options.max_nodes, options.rdzv) == (1, 2, ("node0", 29400))
    assert command == [sys.executable, "-m", "megatron_gkd", "train", "recipe.yaml", "--attn", "sdpa"]
    assert cli.main(["generate", "recipe.yaml", "--nproc", "gpu", "--n", "4", *OWN["generate"]]) == 75
    assert launched[1][1][4:] == ["recipe.yaml", "--n", "4", *OWN["generate"]]
    assert cli.main(["score", "recipe.yaml", "--nproc", "2"]) == 2
    assert capsys.readouterr().err.startswith("--output: missing; ")


def test_the_world_size_comes_from_the_launcher(workspace, trainer, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert cli.main(["train", "recipe.yaml"]) == 2
    assert "must divide the number of processes (3)" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert cli.main(["train", "recipe.yaml"]) == 2
    assert "must divide the number of processes (1)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rank", "line"), [("0", "train.jsonl:3: not JSON\n"), ("1", "rank 1: train.jsonl:3: not JSON\n")]
)
def test_a_user_error_of_the_run_is_one_line_on_any_rank(workspace, trainer, capsys, monkeypatch, rank, line):
    monkeypatch.setenv("RANK", rank)
    trainer.error = UserError("train.jsonl:3: not JSON")
    assert cli.main(["train", "recipe.yaml"]) == 2
    assert capsys.readouterr().err == line


def test_an_unexpected_exception_keeps_its_traceback(workspace, trainer):
    trainer.error = RuntimeError("bug")
    with pytest.raises(RuntimeError, match="bug"):
        cli.main(["train", "recipe.yaml"])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian", "recipe.yaml"], "megatron-gkd trian: unknown command; did you mean train?"),
        (["zzz"],
         "megatron-gkd zzz: unknown command; the commands are " + ", ".join(cli.COMMANDS)),
        (["train"], "megatron-gkd train: the recipe's path must come first: megatron-gkd train recipe.yaml"),
        (["train", "--beta", "1"],
         "megatron-gkd train: the recipe's path must come first: megatron-gkd train recipe.yaml"),
        (["train", "no.yaml"], "no.yaml: can't be read: No such file or directory"),
        (["train", "recipe.yaml", "--nproc", "2"],
         "--nproc = 2: RANK is set, so a launcher has started this process already; remove --nproc or unset RANK"),
        (["train", "recipe.yaml", "--nnodes", "2"],
         "--nnodes: needs --nproc N, the number of processes to start on this node"),
        (["check", "recipe.yaml", "--nproc", "two"], "--nproc = two: must be an integer >= 1"),
        (["check", "recipe.yaml", "--nproc"], "--nproc = : must be an integer >= 1"),
    ],
)  # fmt: skip
def test_wrong_command_lines(workspace, capsys, arguments, line):
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == line + "\n"


def test_check_prints_the_resolved_recipe_and_the_layout(workspace, capsys):
    arguments = ["--nproc", "8", "--beta=1", "--pipeline_model_parallel_size", "2", "--packing"]
    assert cli.main(["check", "recipe.yaml", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "beta: 1.0" in printed and "adam_beta1: 0.9" in printed
    assert printed.splitlines()[-3:] == [
        "layout:  8 processes = tensor 2 x context 1 x pipeline 2 x data 2",
        "experts: 8 processes = tensor 1 x expert 1 x pipeline 2 x data 4",
        "step:    8 rows = data 2 x microbatches 4 x rows 1; packing makes them fewer",
    ]
    resolved, _, _ = printed.rpartition("layout:")
    workspace.recipe.write_text(resolved)
    assert workspace.load(world_size=8).distill.beta == 1.0, "what is printed is a recipe"


def test_check_assumes_one_process(workspace, capsys):
    assert cli.main(["check", "recipe.yaml"]) == 2
    assert "must divide the number of processes (1)" in capsys.readouterr().err


def test_usage_and_version(capsys):
    assert cli.main(["--help"]) == 0
    assert "usage: megatron-gkd train recipe.yaml" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"megatron-gkd {megatron_gkd.__version__}\n"
    assert cli.main([]) == 2
    assert "usage:" in capsys.readouterr().err


def test_train_help_names_every_key_in_under_a_second_of_work():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(sys.executable, "-m", "megatron_gkd", "train", "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and done.stderr == ""
    for leaf, section in keys.SECTION_OF.items():
        _, _, below = done.stdout.partition(f"\n{section}:\n")
        field = keys.find_field(leaf)
        assert f"  --{leaf}  {keys.describe_allowed(field)}  [" in below
        assert field.description in below
    assert "--beta  a number in [0, 1]  [default: 0.5]" in done.stdout
    for option in ("nproc", "nnodes", "node-rank", "rdzv", "rdzv-id", "max-restarts", "shutdown-timeout"):
        assert f"\n  --{option}  " in done.stdout
    assert "--model  a text  [required]" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_help_to_a_reader_that_stops_reading():
    done = run("bash", "-c", f"{sys.executable} -m megatron_gkd train --help | true; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize("command", ["score", "generate"])
def test_a_command_names_its_own_options(command, capsys):
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"options of {command}:\n" in text and "  --output  " in text and "  --beta  " in text


@pytest.mark.parametrize("nproc", [(), ("--nproc", "2")])
@pytest.mark.parametrize("command", ["train", "check", "score", "generate"])
def test_a_wrong_recipe_needs_no_torch(workspace, monkeypatch, command, nproc):
    if nproc:
        monkeypatch.delenv("RANK")
        monkeypatch.delenv("WORLD_SIZE")
    program = (
        "import sys; from megatron_gkd.cli import main\n"
        f"code = main([{command!r}, 'recipe.yaml', '--beta', '2', *{[*OWN.get(command, []), *nproc]}])\n"
        "heavy = {'torch', 'transformers', 'megatron.core', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = run(sys.executable, "-c", program)
    assert done.returncode == 2
    assert "distill.beta = 2: must be a number in [0, 1]" in done.stderr and "Traceback" not in done.stderr


def test_the_module_is_the_command(workspace):
    done = run(sys.executable, "-m", "megatron_gkd", "train", "recipe.yaml", "--beta", "2")
    assert done.returncode == 2
    assert done.stderr == "recipe.yaml: distill.beta = 2: must be a number in [0, 1]\n"
