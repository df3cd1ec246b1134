import pytest

from megatron_gkd.errors import UserError
from megatron_gkd.launch import environment

WORLD = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "29500"}


def test_the_size_of_the_world():
    assert environment.world_size({}) == 1
    assert environment.world_size({"WORLD_SIZE": "1"}) == 1
    assert environment.world_size(WORLD) == 2


@pytest.mark.parametrize("text", ["", "two", "-1", "1.5", "²", " "])
@pytest.mark.parametrize("name", WORLD)
def test_variables_that_are_no_numbers_are_one_line(name, text):
    with pytest.raises(UserError, match=rf"^{name} = '{text}': must be an integer >= [01]; torchrun "):
        environment.world_size(WORLD | {name: text})


@pytest.mark.parametrize(
    ("values", "start"),
    [
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = '0': must be an integer >= 1; "),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT = 70000: must be an integer from 1 to 65535; "),
        ({"RANK": "5"}, "RANK = 5: must be less than WORLD_SIZE (2); "),
    ],
)
def test_values_out_of_range(values, start):
    with pytest.raises(UserError) as error:
        environment.world_size(WORLD | values)
    assert str(error.value).startswith(start) and "\n" not in str(error.value)


def test_one_of_two_variables():
    with pytest.raises(UserError, match=r"^RANK = 0: WORLD_SIZE is not set; "):
        environment.world_size({"RANK": "0"})
    with pytest.raises(UserError, match=r"^WORLD_SIZE = 2: RANK is not set; "):
        environment.world_size({"WORLD_SIZE": "2"})


@pytest.mark.parametrize(("text", "rank"), [("3", 3), ("", 0), ("x", 0)])
def test_the_rank_is_0_where_it_cannot_be_read(monkeypatch, text, rank):
    monkeypatch.setenv("RANK", text)
    assert environment.rank() == rank
