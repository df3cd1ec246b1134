"""A node whose ranks have only lost a connection leaves the exit code to the node with the cause."""

from types import SimpleNamespace

import pytest

from megatron_gkd.launch import agent as module
from megatron_gkd.launch.agent import RankAgent
from megatron_gkd.launch.failures import Failure
from megatron_gkd.launch.report import End

LOST = Failure("RuntimeError: Connection closed by peer", None, 1, is_shared=False, time=0.0)
OWN = Failure("KeyError: 'x'", None, 1, is_shared=False, time=0.0)


def agent_of(failure, **options):
    """Return the agent of a node whose only rank has failed, where another node reports its own failure at last."""
    agent = object.__new__(RankAgent)
    agent._options, agent._received = SimpleNamespace(max_nodes=2), []
    agent._remaining_restarts = options.get("restarts", 0)
    agent.ends, agent.elsewhere = [End(0, 1, 0.0, failure)], None
    looks = []

    def check_nodes(watch):
        looks.append(watch)
        if len(looks) == options.get("found_after", 2):
            agent.elsewhere = "node 1 (b): rank 1 of 2 was killed by SIGKILL", 137

    agent._check_nodes = check_nodes
    agent._wait_for_cause(None)
    return agent, len(looks)


def test_the_cause_on_another_node_gives_the_exit_code():
    agent, _ = agent_of(LOST)
    assert agent.exit_code == 137


@pytest.mark.parametrize(("failure", "restarts"), [(OWN, 0), (LOST, 1)])
def test_a_failure_of_its_own_and_a_restart_do_not_wait(failure, restarts):
    assert agent_of(failure, restarts=restarts)[1] == 0


def test_the_wait_has_a_limit(monkeypatch):
    monkeypatch.setattr(module, "CAUSE_WITHIN_S", 0.2)
    agent, looks = agent_of(LOST, found_after=1000)
    assert agent.exit_code == 1 and looks > 0
