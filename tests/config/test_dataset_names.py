"""How the names of data sets are read."""

import pytest

from megatron_gkd.config.dataset_names import DatasetName, file_kind

THERE = {"train.jsonl", "a#3", "owner/name", "saved", "data/x[1]*.jsonl"}


def parse(text):
    return DatasetName.parse(text, exists=THERE.__contains__)


@pytest.mark.parametrize(
    ("text", "kind", "location", "parts", "size"),
    [
        ("train.jsonl", "path", "train.jsonl", [], None),
        ("train.jsonl#500", "path", "train.jsonl", [], 500),
        ("a#3", "path", "a#3", [], None),  # a file has this name
        ("a#3#4", "path", "a#3", [], 4),
        ("owner/name", "path", "owner/name", [], None),  # a folder comes before an id
        ("saved:test", "path", "saved", ["test"], None),
        ("saved:main:test#7", "path", "saved", ["main", "test"], 7),
        ("saved::test", "path", "saved", ["test"], None),
        ("data/x[1]*.jsonl", "path", "data/x[1]*.jsonl", [], None),
        ("data/*.jsonl", "pattern", "data/*.jsonl", [], None),
        ("data/[ab].jsonl.gz#9", "pattern", "data/[ab].jsonl.gz", [], 9),
        ("s3://bucket/x.jsonl#9", "url", "s3://bucket/x.jsonl", [], 9),
        ("https://host/x.jsonl?a=b", "url", "https://host/x.jsonl?a=b", [], None),
        ("file:///data/my%20rows.jsonl", "path", "/data/my rows.jsonl", [], None),
        ("AI-MO/NuminaMath-1.5", "hub", "AI-MO/NuminaMath-1.5", [], None),
        ("o/n:main", "hub", "o/n", ["main"], None),
        ("o/n:main:train#500", "hub", "o/n", ["main", "train"], 500),
        ("o/n::test", "hub", "o/n", ["test"], None),
        ("o/n:main:train[:10]", "hub", "o/n", ["main", "train[:10]"], None),
        ("MS::o/n:main", "hub", "o/n", ["main"], None),
        ("data/train.jsonl", "path", "data/train.jsonl", [], None),  # the ending of a file, which no id has
        ("data/train.csv.gz", "path", "data/train.csv.gz", [], None),
        ("../name", "path", "../name", [], None),
        ("/data/name", "path", "/data/name", [], None),
        ("train", "path", "train", [], None),
    ],
)
def test_a_name(text, kind, location, parts, size):
    name = parse(text)
    assert (name.kind, name.location, name.parts, name.size) == (kind, location, parts, size)
    assert name.text == (text if size is None else text[: -len(f"#{size}")])


def test_the_hub_of_an_id():
    assert [parse(text).hub for text in ("o/n", "HF::o/n", "MS::o/n")] == [None, "HF", "MS"]


@pytest.mark.parametrize("size", ["", "0", "x", "-1", "1.5"])
def test_a_size_is_a_number_of_rows(size):
    with pytest.raises(ValueError, match=f"^#{size} must be a number of rows >= 1"):
        parse(f"train.jsonl#{size}")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", ("jsonl", "")),
        ("a.b.JSON.zst", ("json", "zst")),
        ("https://host/a.csv.gz?token=b.c", ("csv", "gz")),
        ("a.parquet", ("parquet", "")),
        ("a.parquet.gz", None),
        ("a.txt", None),
        ("a.gz", None),
        ("jsonl", None),
        ("a.jsonl/b", None),
    ],
)
def test_the_kind_of_a_file(name, kind):
    assert file_kind(name) == kind
