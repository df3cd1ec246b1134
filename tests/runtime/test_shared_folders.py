"""A folder that a node does not share is named, with the node; a shared one keeps no file of the check."""

import socket

import pytest
import torch.distributed as dist
from world import process_queue, start_process

from megatron_gkd.errors import GkdError
from megatron_gkd.runtime import shared_folders
from megatron_gkd.runtime.nodes import Nodes
from megatron_gkd.runtime.shared_folders import require_shared


def _check(rank, store, folder, is_leader, results):
    shared_folders.VISIBLE_WITHIN_S = 0.5
    nodes = Nodes(dist.FileStore(store, -1), rank, 3, is_leader=is_leader)
    try:
        require_shared("output.output_dir", folder, nodes)
        results.put((rank, None, None))
    except GkdError as error:
        results.put((rank, str(error), error.exit_code))


@pytest.fixture
def check(tmp_path):
    """`check(folder of each rank)` returns each rank's message and exit code; ranks 0 and 2 lead nodes."""

    def of(folders):
        results = process_queue()
        processes = [
            start_process(_check, rank, str(tmp_path / "store"), folder, rank != 1, results)
            for rank, folder in enumerate(folders)
        ]
        found = dict((rank, (text, code)) for rank, text, code in (results.get(timeout=60) for _ in folders))
        for process in processes:
            process.join()
        return [found[rank] for rank in range(len(folders))]

    return of


def test_a_folder_that_all_nodes_see_is_accepted_and_left_empty(check, tmp_path):
    folder = tmp_path / "runs/x"
    assert check([folder] * 3) == [(None, None)] * 3
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_that_a_node_has_for_itself_is_named_with_the_node(check, tmp_path, exists):
    here, there = tmp_path / "here", tmp_path / "there"
    if exists:
        there.mkdir()
    problem = (
        f"rank 2 on {socket.gethostname()}: output.output_dir = {there}: the node {socket.gethostname()} does not see "
        "the file that rank 0 has written there; must be on a file system that all nodes share"
    )
    assert check([here, here, there]) == [(problem, 2)] * 3
    assert list(here.iterdir()) == [] and there.exists() == exists


def test_a_folder_that_rank_0_can_not_write_to_is_named(check, tmp_path):
    (tmp_path / "file").write_text("")
    found = check([tmp_path / "file"] * 3)
    assert {code for _, code in found} == {2}
    assert {text for text, _ in found} == {found[0][0]}
    assert found[0][0].startswith(f"output.output_dir = {tmp_path}/file: can't be written to (")
