"""The emulated kernels and the CPU's, built once a session."""

import ctypes

import pytest
from csrc.emulated_kernels import Kernels, build


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("emulated_kernels"))


@pytest.fixture(scope="session")
def cuda(library) -> Kernels:
    return Kernels(library, "cuda")


@pytest.fixture(scope="session")
def cpu(library) -> Kernels:
    return Kernels(library, "cpu")
