import json

import pytest

from megatron_gkd.data.json_text import decode_json, split_list
from megatron_gkd.data.rows import BadRow


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        ('{"a": 1, "b": 2, "a": 1}', "conflicting keys: an object has the key a 2 times"),
        (
            '{"messages": [{"role": "user", "role": "user", "content": "q"}]}',
            "conflicting keys: an object has the",
        ),
        ("[" * 200_000 + "]" * 200_000, "not JSON: it is nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", "not JSON: Exceeds the limit (4300 digits) for integer string conversion"),
    ],
)
def test_a_row_that_is_no_json(text, message):
    with pytest.raises(BadRow) as error:
        decode_json(text)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_the_items_of_a_list_stay_as_they_are_written():
    texts = ['{"a": 1,  "a": 2}', "null", '"x, ]"', "[1, [2]]", "{}"]
    assert list(split_list(" [\n" + " ,\n ".join(texts) + "\t] \n")) == texts
    assert list(split_list("[]")) == []
    assert [json.loads(text) for text in split_list("[1,2]")] == [1, 2]


@pytest.mark.parametrize("text", ["", "{}", "[1", "[1 2]", "[1,]", "[1] 2", "[,1]"])
def test_what_is_no_list(text):
    with pytest.raises(json.JSONDecodeError):
        list(split_list(text))
