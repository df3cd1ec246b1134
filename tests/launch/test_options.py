import pytest

from megatron_gkd.config.errors import RecipeError
from megatron_gkd.launch.options import LAUNCH, LaunchOptions, take


def options(*arguments, environment=None):
    found, rest = take("recipe.yaml", list(arguments), environment or {})
    assert rest == []
    return found


def test_without_nproc_nothing_is_launched():
    assert take("recipe.yaml", ["--beta", "1", "--n", "3"], {}) == (None, ["--beta", "1", "--n", "3"])


def test_the_other_arguments_are_left():
    found, rest = take("recipe.yaml", ["--beta", "1", "--nproc=8", "--packing"], {})
    assert found.nproc == 8 and rest == ["--beta", "1", "--packing"]


def test_one_node():
    assert options("--nproc", "2", environment={"SLURM_JOB_ID": "77"}) == LaunchOptions(2, rdzv_id="77")
    assert options("--nproc", "gpu").nproc == "gpu"


def test_several_nodes():
    found = options(
        *("--nproc", "8", "--nnodes", "4", "--node-rank", "3", "--rdzv", "[fe80::1]:29400", "--rdzv-id", "x"),
        *("--max_restarts", "2", "--shutdown-timeout", "900"),
    )
    assert found == LaunchOptions(8, 4, 4, 3, ("fe80::1", 29400), "x", 2, 900)
    found = options("--nproc", "8", "--nnodes", "2:4", "--rdzv", "node0:1")
    assert (found.min_nodes, found.max_nodes, found.node_rank, found.max_restarts) == (2, 4, None, 0)


def test_the_run_is_named_by_its_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [take(path, ["--nproc", "1"], {})[0].rdzv_id for path in ("a.yaml", tmp_path / "a.yaml", "b.yaml")]
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--nproc", "0"], "--nproc = 0: must be an integer >= 1, or gpu"),
        (["--nproc", "two"], "--nproc = two: must be an integer >= 1, or gpu"),
        (["--nproc"], "--nproc = : must be an integer >= 1, or gpu"),
        (["--nproc", "2", "--nnodes", "3:2"], "--nnodes = 3:2: must be an integer >= 1, or MIN:MAX"),
        (["--nproc", "2", "--nnodes", "3:"], "--nnodes = 3:: must be an integer >= 1, or MIN:MAX"),
        (["--nproc", "2", "--nnodes", "2"], "--nnodes = 2: needs --rdzv HOST:PORT"),
        (["--nproc", "2", "--nnodes", "1:2"], "--nnodes = 1:2: needs --rdzv HOST:PORT"),
        (["--nproc", "2", "--rdzv", "node0"], "--rdzv = node0: must be HOST:PORT"),
        (["--nproc", "2", "--rdzv", "node0:70000"], "--rdzv = node0:70000: must be HOST:PORT"),
        (["--nproc", "2", "--rdzv", ":29400"], "--rdzv = :29400: must be HOST:PORT"),
        (["--nproc", "2", "--max-restarts", "-1"], "--max-restarts = -1: must be an integer >= 0"),
        (["--nproc", "2", "--shutdown-timeout", "0"], "--shutdown-timeout = 0: must be an integer >= 1"),
        (["--nproc", "2", "--node-rank", "1"], "--node-rank = 1: must be less than the number of nodes (1)"),
        (["--nproc", "2", "--nnodes", "1:4", "--rdzv", "a:1", "--node-rank", "1"],
         "--node-rank = 1: needs a fixed number of nodes; --nnodes is 1:4"),
        (["--nnodes", "2"], "--nnodes: needs --nproc N, the number of processes to start on this node"),
        (["--max-restarts", "0"], "--max-restarts: needs --nproc N, the number of processes to start on this node"),
    ],
)  # fmt: skip
def test_wrong_options_are_one_line(arguments, line):
    with pytest.raises(RecipeError) as error:
        take("recipe.yaml", arguments, {})
    assert error.value.problems == [line]


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_rank_of_another_launcher_starts_no_processes(name):
    with pytest.raises(RecipeError) as error:
        take("recipe.yaml", ["--nproc", "8"], {name: "0"})
    assert error.value.problems == [
        f"--nproc = 8: {name} is set, so a launcher has started this process already; remove --nproc or unset {name}"
    ]


def test_the_defaults_of_help_are_those_that_hold():
    found = options("--nproc", "1")
    assert LAUNCH["nnodes"].default == found.min_nodes == found.max_nodes
    assert LAUNCH["max-restarts"].default == found.max_restarts
    assert LAUNCH["shutdown-timeout"].default == found.shutdown_timeout == LaunchOptions(1).shutdown_timeout
