"""Kinds of files, compressed ones, patterns of many files, and folders."""

import bz2
import gzip
import lzma

import datasets
import numpy as np
import pyarrow as pa
import pytest

from megatron_gkd.data.bad_row import BadRow
from megatron_gkd.data.json_text import decode_json
from megatron_gkd.data.sources import TEXT, describe_source
from megatron_gkd.data.sources.opening import parse_name
from megatron_gkd.errors import UserError

ROWS = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}]


def _zstd(content):
    stream = pa.BufferOutputStream()
    with pa.CompressedOutputStream(stream, "zstd") as file:
        file.write(content)
    return stream.getvalue().to_pybytes()


COMPRESS = {"gz": gzip.compress, "zst": _zstd, "xz": lzma.compress, "bz2": bz2.compress}


@pytest.mark.parametrize("ending", COMPRESS)
class TestCompression:
    def test_lines_keep_their_numbers(self, tmp_path, lines, opened, rows_of, ending):
        path = tmp_path / f"rows.jsonl.{ending}"
        path.write_bytes(COMPRESS[ending](lines))
        source = opened(path)
        assert rows_of(source) == ROWS
        assert source.locate(1) == f"{path}, line 2"

    def test_a_csv_file(self, tmp_path, opened, rows_of, ending):
        path = tmp_path / f"rows.csv.{ending}"
        path.write_bytes(COMPRESS[ending](b"prompt,response\na,b\nc,d\n"))
        assert rows_of(opened(path)) == ROWS

    @pytest.mark.parametrize("content", [lambda made: made[:-9], lambda made: made[:3], lambda made: b"x" * 40])
    def test_a_damaged_file_is_one_line(self, tmp_path, lines, opened, ending, content):
        path = tmp_path / f"rows.jsonl.{ending}"
        path.write_bytes(content(COMPRESS[ending](lines)))
        with pytest.raises(UserError, match=f"^{path}: cannot be read: [A-Z]") as error:
            opened(path)
        assert "\n" not in str(error.value)

    def test_an_empty_file_has_no_rows_or_is_one_line(self, tmp_path, opened, ending):
        path = tmp_path / f"rows.jsonl.{ending}"
        path.write_bytes(b"")
        if ending in ("gz", "zst"):
            assert len(opened(path)) == 0
        else:
            with pytest.raises(UserError, match=f"^{path}: cannot be read: Compressed file ended before"):
                opened(path)


class TestCsv:
    def write(self, tmp_path, text, name="rows.csv"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / name

    def test_cells_are_text_and_empty_ones_absent(self, tmp_path, opened, rows_of):
        path = self.write(tmp_path, '\ufeffprompt,response,system,\n"a, b\nc",007,,0\n\nyes,NA, ,1\n')
        source = opened(path)
        assert rows_of(source) == [{"prompt": "a, b\nc", "response": "007"}, {"prompt": "yes", "response": "NA"}]
        assert source.locate(1) == f"{path}, row 2"

    def test_lists_are_parsed(self, tmp_path, opened, rows_of):
        path = self.write(tmp_path, 'messages,images,prompt\n"[{""role"": ""user""}]","[""a.png""]",[1]\n[,,\n')
        assert rows_of(opened(path)) == [
            {"messages": [{"role": "user"}], "images": ["a.png"], "prompt": "[1]"},
            {"messages": "["},
        ]

    def test_lists_are_parsed_by_their_new_names(self, tmp_path, opened, rows_of):
        path = self.write(tmp_path, "dialog\n[]\n")
        assert rows_of(opened(path)) == [{"dialog": "[]"}]
        assert rows_of(opened(path, columns={"dialog": "messages"})) == [{"dialog": []}]

    def test_tabs_and_long_cells(self, tmp_path, opened, rows_of):
        path = self.write(tmp_path, "prompt\tresponse\na, b\t" + "x" * 200_000 + "\n", "rows.tsv")
        assert rows_of(opened(path)) == [{"prompt": "a, b", "response": "x" * 200_000}]

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("a,b,a\n1,2,3\n", "two columns are named a"),
            ('a,b\n1,"2\n', "line 2: unexpected end of data"),
            (b"a,b\n1,\xff\n", "not UTF-8 after line"),
        ],
    )
    def test_a_damaged_table_is_one_line(self, tmp_path, opened, text, reason):
        path = self.write(tmp_path, text)
        with pytest.raises(UserError, match=f"^{path}: cannot be read: {reason}"):
            opened(path)

    def test_a_row_with_other_cells_is_a_bad_row(self, tmp_path, opened):
        source = opened(self.write(tmp_path, "a,b\n1,2\n3\n"))
        with pytest.raises(BadRow, match=r"^not a row of the table: line 3 has 1 cells"):
            decode_json(source.table[1][TEXT])
        assert decode_json(source.table[0][TEXT]) == {"a": "1", "b": "2"}

    @pytest.mark.parametrize("text", ["", "a,b\n", "\n"])
    def test_a_table_without_rows(self, tmp_path, opened, text):
        assert len(opened(self.write(tmp_path, text))) == 0


class TestTables:
    @pytest.mark.parametrize("opener", [pa.ipc.new_stream, pa.ipc.new_file])
    def test_arrow_files(self, tmp_path, opened, rows_of, opener):
        table = pa.Table.from_pylist(ROWS)
        with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as file, opener(file, table.schema) as writer:
            writer.write_table(table)
        assert rows_of(opened(tmp_path / "rows.arrow")) == ROWS

    def test_tables_without_rows(self, tmp_path, opened):
        table = datasets.Dataset.from_list(ROWS).select([])
        table.to_parquet(tmp_path / "rows.parquet")
        table.save_to_disk(tmp_path / "saved")
        assert [len(opened(tmp_path / name)) for name in ("rows.parquet", "saved")] == [0, 0]

    def test_splits_of_a_folder(self, tmp_path, opened, rows_of):
        first, second = (datasets.Dataset.from_list([row]) for row in ROWS)
        datasets.DatasetDict(train=first, test=second).save_to_disk(tmp_path / "two")
        datasets.DatasetDict(only=second).save_to_disk(tmp_path / "one")
        two, one = tmp_path / "two", tmp_path / "one"
        source = opened(f"{two}:test")
        assert rows_of(source) == rows_of(opened(one)) == rows_of(opened(f"{one}:only")) == ROWS[1:]
        assert source.locate(0) == f"{two}:test, row 1"
        for name, problem in {
            f"{two}": r"holds several splits \(train, test\); name one of them",
            f"{two}:valid": r"has no split valid \(train, test\); name one of them",
            f"{two}:a:train": r"has no split a:train \(train, test\); name one of them",
        }.items():
            with pytest.raises(UserError, match=f"^{two}: {problem} \\({two}:train\\)$"):
                opened(name)

    def test_a_saved_folder_and_a_file_have_no_splits(self, tmp_path, opened, lines):
        datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
        (tmp_path / "a.jsonl").write_bytes(lines)
        with pytest.raises(UserError, match="has one split; write"):
            opened(tmp_path / "saved:train")
        with pytest.raises(UserError, match="is a file, which has neither subsets nor splits; write"):
            opened(tmp_path / "a.jsonl:train")


class TestPatterns:
    def test_files_are_sorted_and_name_themselves(self, tmp_path, opened, rows_of, lines):
        (tmp_path / "b.jsonl").write_bytes(lines)
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\n" + lines))
        (tmp_path / "c.json").write_bytes(b"[" + lines.splitlines()[0] + b"]")
        (tmp_path / "d.csv").write_text("prompt\nx\n")
        (tmp_path / "folder.jsonl").mkdir()
        source = opened(tmp_path / "*.[jc]*")
        places = ["a.jsonl.gz, line 1", "a.jsonl.gz, line 2", "a.jsonl.gz, line 3", "b.jsonl, line 1"]
        places += ["b.jsonl, line 2", "c.json, row 1", "d.csv, row 1"]
        assert [source.locate(index) for index in range(len(source))] == [f"{tmp_path}/{place}" for place in places]
        assert source.find_rows().tolist() == [1, 2, 3, 4, 5, 6]
        chosen = source.select(np.array([2, 6]))
        assert rows_of(chosen) == [ROWS[1], {"prompt": "x"}]
        assert [chosen.locate(index) for index in (0, 1)] == [source.locate(2), source.locate(6)]
        with pytest.raises(IndexError):
            source.locate(7)

    def test_tables_with_other_columns(self, tmp_path, opened, rows_of):
        datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
        datasets.Dataset.from_list([{"messages": [{"role": "user"}]}]).to_parquet(tmp_path / "b.parquet")
        assert rows_of(opened(tmp_path / "*.parquet")) == [*ROWS, {"messages": [{"role": "user"}]}]

    def test_files_that_cannot_be_joined(self, tmp_path, opened, lines):
        datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
        datasets.Dataset.from_list([{"prompt": 3}]).to_parquet(tmp_path / "b.parquet")
        (tmp_path / "c.jsonl").write_bytes(lines)
        with pytest.raises(UserError, match="the files have different columns: "):
            opened(tmp_path / "*.parquet")
        with pytest.raises(UserError, match="are of different kinds, text and tables; name them by two patterns"):
            opened(tmp_path / "[bc].*")
        with pytest.raises(UserError, match=r"none\*: no file matches this pattern"):
            opened(tmp_path / "none*")

    def test_a_new_file_changes_what_the_rows_depend_on(self, tmp_path, lines):
        (tmp_path / "a.jsonl").write_bytes(lines)
        name = parse_name(str(tmp_path / "*.jsonl"))
        before = describe_source(name)
        (tmp_path / "b.jsonl").write_bytes(lines)
        assert describe_source(name)[:1] == before and len(describe_source(name)) == 2


def test_rows_from_an_index_on(tmp_path, opened):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "{index}"}}\n' for index in range(2500)))
    source = opened(path)
    found = list(source.iterate(998, 2003))
    assert [index for index, _ in found] == list(range(998, 2003))
    assert all(row == {"text": f'{{"prompt": "{index}"}}'} for index, row in found)
    assert list(source.iterate(2500)) == []
