import json

import datasets
import pytest

from megatron_gkd.data.json_text import decode_json
from megatron_gkd.data.rows import BadRow
from megatron_gkd.data.sources import describe_source, drop_nulls, open_source
from megatron_gkd.data.sources.opening import parse_name
from megatron_gkd.errors import UserError

ROWS = [{"prompt": "a", "response": "b"}, {"messages": [], "tools": [{"x": {"y": 1}}]}, {"tools": [{"x": 2}]}]


def decoded(source):
    return [decode_json(text) for text in source.table["text"]]


def test_json_lines_may_have_unlike_schemas(write_jsonl, tmp_path):
    path = write_jsonl(ROWS)
    source = open_source(str(path), str(tmp_path / "scratch"))
    assert decoded(source) == ROWS
    assert source.locate(2) == f"{path}, line 3"


def test_json_may_be_a_list_or_lines(tmp_path):
    array, lines = tmp_path / "array.json", tmp_path / "lines.json"
    array.write_text("\n " + json.dumps(ROWS, indent=1))
    lines.write_text("\n".join(map(json.dumps, ROWS)))
    assert decoded(open_source(str(array), str(tmp_path))) == ROWS
    assert decoded(open_source(str(lines), str(tmp_path))) == ROWS
    assert open_source(str(array), str(tmp_path)).locate(0) == f"{array}, row 1"


def test_line_numbers_count_lines_and_nothing_else(tmp_path):
    """A byte order mark, Windows line ends, blank lines and line separators inside a string."""
    path = tmp_path / "odd.jsonl"
    path.write_bytes('\ufeff{"a": "x\u2028y"}\r\n\r\n{"a": 2}'.encode())
    texts = open_source(str(path), str(tmp_path)).table["text"]
    assert list(texts) == ['{"a": "x\u2028y"}', "", '{"a": 2}']


def test_bytes_that_are_not_utf8_are_not_json(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"a": "ok"}\n{"a": "ä"}\n'.encode("latin-1"))
    texts = open_source(str(path), str(tmp_path)).table["text"]
    assert decode_json(texts[0]) == {"a": "ok"}
    with pytest.raises(BadRow, match=r"not JSON: Invalid \\escape at column 8"):
        decode_json(texts[1])


def test_parquet_and_saved_folders(tmp_path):
    table = datasets.Dataset.from_list([{"a": 1, "b": None}, {"a": None, "b": [{"c": 1, "d": None}]}])
    table.to_parquet(tmp_path / "rows.parquet")
    table.with_format("torch").save_to_disk(tmp_path / "saved")
    for name in ("rows.parquet", "saved"):
        source = open_source(str(tmp_path / name), str(tmp_path / "scratch"))
        assert [drop_nulls(row) for row in source.table] == [{"a": 1}, {"b": [{"c": 1}]}]
        assert source.locate(0) == f"{tmp_path / name}, row 1"


def test_a_path_with_characters_of_a_pattern(write_jsonl, tmp_path):
    path = write_jsonl(ROWS, "train[1]*.jsonl")
    assert decoded(open_source(str(path), str(tmp_path / "scratch"))) == ROWS


def described(path):
    return [file for file, *_ in describe_source(parse_name(str(path)))]


def test_what_a_source_depends_on(tmp_path, write_jsonl):
    (tmp_path / "saved" / "deep").mkdir(parents=True)
    (tmp_path / "saved" / "deep" / "b").touch()
    (tmp_path / "saved" / "a").touch()
    assert described(tmp_path / "saved") == [str(tmp_path / "saved" / "a"), str(tmp_path / "saved" / "deep" / "b")]
    assert described(write_jsonl(ROWS)) == [str(tmp_path / "train.jsonl")]
    assert described(tmp_path / "*.jsonl") == [str(tmp_path / "train.jsonl")]
    with pytest.raises(UserError, match="nothing: no such file or folder"):
        describe_source(parse_name(str(tmp_path / "nothing")))


def test_a_source_that_cannot_be_opened_is_an_error(tmp_path):
    (tmp_path / "rows.txt").write_text("a,b\n")
    (tmp_path / "broken.parquet").write_text("this is no parquet")
    (tmp_path / "broken.json").write_text("[1, 2")
    (tmp_path / "plain").mkdir()
    splits = datasets.DatasetDict({name: datasets.Dataset.from_dict({"a": [1]}) for name in ("train", "test")})
    splits.save_to_disk(tmp_path / "splits")
    for name, message in {
        "gone.jsonl": "no such file or folder",
        "rows.txt": "unknown kind of file; allowed are .jsonl, .json, .csv, .tsv, .parquet, .arrow, text kinds also ",
        "broken.parquet": "cannot be read: ",
        "broken.json": "cannot be read: Expecting ',' delimiter",
        "plain": "not a folder that datasets.Dataset.save_to_disk wrote",
        "splits": r"holds several splits \(train, test\); name one of them",
    }.items():
        with pytest.raises(UserError, match=f"^{tmp_path / name}: {message}") as error:
            open_source(str(tmp_path / name), str(tmp_path / "scratch"))
        assert "\n" not in str(error.value)
