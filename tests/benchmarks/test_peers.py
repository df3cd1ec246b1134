"""Definitions are taken out of installed files without importing the packages."""

import pytest
from benchmarks.peers import Unavailable, definitions, installed

SOURCE = """
import math
import torch
import a_dependency_that_is_not_there
from another.one import helper

SCALE = 2.0

def scaled(x):
    return SCALE * math.sqrt(x)

def with_helper(x):
    return helper(x)

class Trainer(a_dependency_that_is_not_there.Base):
    @staticmethod
    def loss(x):
        return torch.tensor(x) + 1
"""


@pytest.fixture
def site(tmp_path):
    """A folder as `pip install --target` makes it."""
    (tmp_path / "peer").mkdir()
    (tmp_path / "peer" / "losses.py").write_text(SOURCE)
    (tmp_path / "peer_package-1.2.dist-info").mkdir()
    (tmp_path / "peer_package-1.2.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: peer-package\nVersion: 1.2\n"
    )
    return str(tmp_path)


def test_chosen_definitions_run_without_the_packages_dependencies(site):
    package = installed("peer-package", [site])
    found = definitions(package, "peer/losses.py", "SCALE", "scaled", "with_helper", helper=lambda x: -x)
    assert found.scaled(4.0) == 4.0
    assert found.with_helper(3) == -3
    assert not hasattr(found, "Trainer")


def test_a_static_method_without_its_class(site):
    found = definitions(installed("peer-package", [site]), "peer/losses.py", "Trainer.loss")
    assert found.loss(1.0).item() == 2.0


def test_what_is_missing_is_named(site):
    with pytest.raises(Unavailable, match="not installed") as missing:
        installed("no-such-peer", [site])
    assert missing.value.install == "pip install --no-deps no-such-peer"
    package = installed("peer-package", [site])
    with pytest.raises(Unavailable, match=r"peer-package 1\.2 has no absent in peer/losses\.py"):
        definitions(package, "peer/losses.py", "absent")
    with pytest.raises(Unavailable, match=r"peer-package 1\.2 has no peer/absent\.py"):
        definitions(package, "peer/absent.py")
