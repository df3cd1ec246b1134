"""Devices by name and from files, and amounts of memory."""

import pytest

from megatron_gkd.config.byte_sizes import parse_bytes
from megatron_gkd.errors import UserError
from megatron_gkd.planning.cluster import Assumptions, Rates
from megatron_gkd.planning.devices import DEVICES, find_device

FIGURES = "name: x\nmemory_gb: 10\nbf16_tflops: 1\nmemory_gb_s: 2\nnvlink_gb_s: 3\nnetwork_gb_s: 4\nhost_gb_s: 5\n"


@pytest.mark.parametrize(
    ("text", "number"),
    [("80GB", 80 * 10**9), ("80gib", 80 * 2**30), ("1.5 MiB", 3 * 2**19), ("512B", 512), (".5kB", 500)],
)
def test_amounts_of_memory(text, number):
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "GB", "80XB", "-1GB", "0GB", "80", "1e9", "eighty"])
def test_other_texts_are_none(text):
    with pytest.raises(ValueError, match="must be as 80GB"):
        parse_bytes(text)


def test_links_get_slower_from_the_memory_outwards():
    for device in DEVICES.values():
        assert device.memory_gb_s > device.nvlink_gb_s >= device.network_gb_s


def test_a_device_from_a_file(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(FIGURES)
    device = find_device(str(path))
    assert device.network_gb_s == 4
    assert Rates.of(device, Assumptions(mfu=0.5, bandwidth_efficiency=0.1)) == Rates(5e11, 2e8, 3e8, 4e8, 5e8)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (FIGURES.replace("host_gb_s: 5", ""), "host_gb_s: Field required"),
        (FIGURES + "other: 1", "other: Extra inputs are not permitted"),
        (FIGURES.replace("memory_gb: 10", "memory_gb: -1"), "memory_gb: Input should be greater than 0"),
        ("[", "not YAML"),
        ("", "content: Input should be"),
        (None, "can't be read"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, content, problem):
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as error:
        find_device(str(path))
    text = str(error.value)
    assert text.startswith(f"--device = {path}: ") and problem in text and "\n" not in text


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="--device = h1000: unknown; must be a100, h100, "):
        find_device("h1000")
