"""torchrun ends all ranks when the first one leaves: a refusal is printed once, whichever that is."""

import pytest
from launching import Forked, finish
from ports import free_port
from recipe_workspace import Workspace

WRONG = ("--beta", "1.5", "--lmbda", "2")
LINES = [
    "recipe.yaml: distill.beta = 1.5: must be a number in [0, 1]",
    "recipe.yaml: distill.lmbda = 2: must be a number in [0, 1]",
]
DELAYED = """
import os, sys, time
from megatron_gkd import cli

time.sleep(4 if os.environ["RANK"] == "{rank}" else 0)
cli.run()
"""
ROW = """
import os, time
from megatron_gkd import cli
from megatron_gkd.errors import UserError

def work(arguments):
    time.sleep(4 if os.environ["RANK"] == "0" else 0)
    raise UserError("train.jsonl, line 41: not JSON")

cli._dispatch = work
cli.run()
"""


def torchrun(folder, options, program, *arguments, name="agent"):
    return Forked(folder, "torch.distributed.run", *options, program, "train", "recipe.yaml", *arguments, name=name)


def stderr_of(process, folder, name="agent"):
    assert finish(process) == 1, "torchrun's own"
    return (folder / f"{name}.err").read_text()


@pytest.mark.parametrize("delayed", ["0", "1"])
def test_a_wrong_recipe_is_printed_once_whichever_rank_is_late(tmp_path, delayed):
    Workspace(tmp_path)
    (tmp_path / "delayed.py").write_text(DELAYED.format(rank=delayed))
    process = torchrun(tmp_path, ("--standalone", "--nproc-per-node", "2"), "delayed.py", *WRONG)
    text = stderr_of(process, tmp_path)
    assert [text.splitlines().count(line) for line in LINES] == [1, 1]
    assert text.count("must be a number") == 2


def test_a_bad_row_is_printed_once(tmp_path):
    (tmp_path / "row.py").write_text(ROW)
    text = stderr_of(torchrun(tmp_path, ("--standalone", "--nproc-per-node", "2"), "row.py"), tmp_path)
    assert text.count("line 41") == 1 and "rank 1: train.jsonl, line 41: not JSON\n" in text


def test_on_several_nodes_the_first_one_prints(tmp_path):
    Workspace(tmp_path)
    (tmp_path / "delayed.py").write_text(DELAYED.format(rank="none"))
    nodes = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "x")
    endpoint = ("--rdzv-endpoint", f"127.0.0.1:{free_port()}")
    agents = {name: torchrun(tmp_path, (*nodes, *endpoint), "delayed.py", *WRONG, name=name) for name in ("a", "b")}
    text = "".join(stderr_of(agent, tmp_path, name) for name, agent in agents.items())
    assert [text.splitlines().count(line) for line in LINES] == [1, 1]
