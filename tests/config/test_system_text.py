import pytest

from megatron_gkd.config.system_text import read_system
from megatron_gkd.errors import UserError


@pytest.mark.parametrize("text", ["Be brief.", "a", "Either/or is allowed here.", "two\nlines.txt", "x" * 5000, "\0 a"])
def test_a_text_is_itself(text):
    assert read_system(text) == text


def test_none_is_none():
    assert read_system(None) is None


def test_a_file_is_read_without_its_last_line_break(tmp_path):
    for name in ("system.txt", "system"):
        (tmp_path / name).write_text("\ufeffBe brief.\n\n", encoding="utf-8")
        assert read_system(str(tmp_path / name)) == "Be brief.\n"


@pytest.mark.parametrize("value", ["prompts/no.md", "no.txt", "my system.TXT", "./system", "/no/such/file", "a.jinja"])
def test_a_path_without_a_file(value):
    with pytest.raises(UserError, match=r": must be a text, or a file that exists; it is no file, and looks like a"):
        read_system(value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe", r": cannot be read \(not UTF-8\); must be a text"), (b" \n", ": holds no text; leave it out")],
)
def test_a_file_without_text(tmp_path, content, message):
    (tmp_path / "system").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_system(str(tmp_path / "system"))


def test_a_text_of_blanks():
    with pytest.raises(UserError, match=r"^data.system =  : holds no text"):
        read_system(" ")
