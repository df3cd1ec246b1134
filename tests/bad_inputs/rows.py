"""Bad rows and data files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from bad_inputs.case import Case
from bad_inputs.workspace import ROW, together, with_recipe, with_row, with_text

LINE_2 = "train.jsonl, line 2: "
USER, ASSISTANT = ROW["messages"]


def messages(name: str, *turns: Any, message: str) -> Case:
    """Return a case of bad messages."""
    return Case(name, message, with_row({"messages": list(turns)}))


def _folder(folder: Path) -> None:
    (folder / "train.jsonl").unlink()
    (folder / "train.jsonl").mkdir()


def _unreadable_parquet(folder: Path) -> None:
    (folder / "train.parquet").write_bytes(b"PAR1 and nothing else")


def _text_pixels(folder: Path) -> None:
    with_row({"messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}, ASSISTANT]})(folder)


PLUGIN = """\
from megatron_gkd.data import register_preprocessor

@register_preprocessor("mine")
def mine(row):
    return {result}
"""
PARQUET, JSON_LIST = (with_recipe("train.jsonl", f"train.{kind}") for kind in ("parquet", "json"))
CASES = [
    Case("not JSON", LINE_2 + "not JSON", with_row("{")),
    Case("cut off", LINE_2 + "not JSON", with_row(json.dumps(ROW)[:-5])),
    Case("two objects", LINE_2 + "not JSON", with_row(json.dumps(ROW) * 2)),
    Case("number", LINE_2, with_row("17")),
    Case("null", LINE_2, with_row("null")),
    Case("list", LINE_2, with_row([ROW])),
    Case("not UTF-8", LINE_2, with_text("train.jsonl", json.dumps(ROW).encode() + b'\n{"messages": "\xff"}\n')),
    Case("binary", "train.jsonl", with_text("train.jsonl", bytes(range(256)) * 20)),
    Case("empty file", "yields nothing to train on", with_text("train.jsonl", "")),
    Case("blank lines", "yields nothing to train on", with_text("train.jsonl", "\n\n\n")),
    Case("folder", "train.jsonl", _folder),
    Case("nested 5000 deep", LINE_2, with_row('{"messages": ' + "[" * 5000 + "]" * 5000 + "}")),
    Case("number of 5000 digits", LINE_2, with_row('{"messages": ' + "9" * 5000 + "}")),
    Case("NaN", LINE_2, with_row('{"messages": NaN}')),
    Case("no key that is known", LINE_2, with_row({"foo": "bar"})),
    Case("empty object", LINE_2, with_row({})),
    Case("messages are text", LINE_2, with_row({"messages": "hello"})),
    messages("no message", message=LINE_2),
    messages("message is text", "hello", message=LINE_2),
    messages("no role", {"content": "w1"}, ASSISTANT, message=LINE_2),
    messages("role is a number", {"role": 1, "content": "w1"}, ASSISTANT, message=LINE_2),
    messages("unknown role", {"role": "usr", "content": "w1"}, ASSISTANT, message=LINE_2),
    messages("no content", {"role": "user"}, ASSISTANT, message=LINE_2),
    messages("content is a number", {"role": "user", "content": 5}, ASSISTANT, message=LINE_2),
    messages("no assistant", USER, message=LINE_2),
    messages("empty response", USER, {"role": "assistant", "content": ""}, message=LINE_2),
    messages("response of spaces", USER, {"role": "assistant", "content": "  "}, message=LINE_2),
    messages(
        "image for a text model",
        {"role": "user", "content": [{"type": "image", "image": "x.png"}]},
        ASSISTANT,
        message=LINE_2,
    ),
    messages("weight that is no number", USER, {**ASSISTANT, "loss": "much"}, message=LINE_2),
    messages("negative weight", USER, {**ASSISTANT, "loss": -1}, message=LINE_2),
    Case("prompt is a number", LINE_2, with_row({"prompt": 5, "response": "w1"})),
    Case("no response", LINE_2, with_row({"prompt": "w1"})),
    Case("empty text as the response", LINE_2, with_row({"prompt": "w1", "response": ""})),
    Case("response is a list", LINE_2, with_row({"prompt": "w1", "response": ["w2"]})),
    Case("messages beside a prompt", LINE_2, with_row({**ROW, "prompt": "w1", "response": "w2"})),
    Case("key twice", LINE_2, with_row('{"prompt": "w1", "prompt": "w2", "response": "w3"}')),
    Case("empty teacher_prompt", LINE_2, with_row({**ROW, "teacher_prompt": " "})),
    Case(
        "teacher_prompt without a user",
        LINE_2,
        with_row({"messages": [{"role": "system", "content": "w1"}, ASSISTANT], "teacher_prompt": "w2"}),
    ),
    Case("ids beyond the vocabulary", LINE_2, with_row({"prompt_token_ids": [1, 99_999], "response_token_ids": [4]})),
    Case("ids too large for any integer", LINE_2, with_row({"prompt_token_ids": [2**70], "response_token_ids": [4]})),
    Case("negative ids", LINE_2, with_row({"prompt_token_ids": [-1], "response_token_ids": [4]})),
    Case("ids as text", LINE_2, with_row({"prompt_token_ids": ["w1"], "response_token_ids": [4]})),
    Case("no ids", LINE_2, with_row({"prompt_token_ids": [], "response_token_ids": [4]})),
    Case("tools that are no JSON", LINE_2, with_row({**ROW, "tools": "{"})),
    Case("tools that are numbers", LINE_2, with_row({**ROW, "tools": [1]})),
    Case("template kwargs as text", LINE_2, with_row({**ROW, "chat_template_kwargs": "x"})),
    Case("sharegpt without values", LINE_2, with_row({"conversations": [{"from": "human"}]})),
    Case("history that is no list", LINE_2, with_row({"query": "w1", "response": "w2", "history": "w3"})),
    Case(
        "all too long",
        "yields nothing to train on",
        with_text("train.jsonl", json.dumps({"prompt": "w1 " * 99, "response": "w2"}) + "\n"),
    ),
    Case(
        "unknown kind of file",
        "unknown kind of file",
        together(with_text("train.doc", "x"), with_recipe("train.jsonl", "train.doc")),
    ),
    Case("Parquet that is none", "train.parquet: cannot be read", together(_unreadable_parquet, PARQUET)),
    Case("empty Parquet", "train.parquet", together(with_text("train.parquet", ""), PARQUET)),
    Case(
        "JSON that is cut off",
        "train.json: cannot be read",
        together(with_text("train.json", '[{"prompt": "w1"'), JSON_LIST),
    ),
    Case("JSON of numbers", "train.json, row 1", together(with_text("train.json", "[1, 2]"), JSON_LIST)),
    Case(
        "compressed file that is cut off",
        "train.jsonl.gz",
        together(
            with_text("train.jsonl.gz", gzip.compress(json.dumps(ROW).encode() * 99)[:40]),
            with_recipe("train.jsonl", "train.jsonl.gz"),
        ),
    ),
    Case(
        "compressed file that is none",
        "train.jsonl.gz",
        together(with_text("train.jsonl.gz", "no gzip"), with_recipe("train.jsonl", "train.jsonl.gz")),
    ),
    Case(
        "CSV without rows", "train.csv", together(with_text("train.csv", ""), with_recipe("train.jsonl", "train.csv"))
    ),
    Case("pattern of no file", "*.nothing", with_recipe("train.jsonl", "'*.nothing'")),
    Case(
        "plugin that fails",
        "p.py: ZeroDivisionError",
        together(with_text("p.py", "1 / 0\n"), with_recipe("max_length: 64", "max_length: 64, external_plugins: p.py")),
    ),
    Case(
        "plugin that is no Python",
        "p.py: SyntaxError",
        together(with_text("p.py", "def\n"), with_recipe("max_length: 64", "max_length: 64, external_plugins: p.py")),
    ),
    Case(
        "preprocessor that fails",
        "train.jsonl, line 1: ",
        together(
            with_text("p.py", PLUGIN.format(result="row['missing']")),
            with_recipe("max_length: 64", "max_length: 64, external_plugins: p.py, preprocessor: mine"),
        ),
    ),
    Case(
        "preprocessor that drops all",
        "yields nothing to train on",
        together(
            with_text("p.py", PLUGIN.format(result="None")),
            with_recipe("max_length: 64", "max_length: 64, external_plugins: p.py, preprocessor: mine"),
        ),
    ),
    Case("cache folder that is a file", "data.dataset_cache_dir", with_text("rows", "x")),
    Case(
        "validation rows that are bad",
        "val.jsonl, line 1",
        together(
            with_text("val.jsonl", "{\n"), with_recipe("max_length: 64", "max_length: 64, val_dataset: val.jsonl")
        ),
    ),
    Case(
        "prompt alone where half is off-policy",
        LINE_2,
        together(with_row({"messages": [USER]}), with_recipe("lmbda: 0.0", "lmbda: 0.5")),
    ),
]
