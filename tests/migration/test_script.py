"""Shell scripts are read as a shell would: quotes, continued lines, variables, arrays, comments, redirections."""

import contextlib
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gkd.migration.script import is_unknown, read_commands
from megatron_gkd.migration.script_text import ScriptProblem


def words(text):
    return [command.words for command in read_commands(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b c", ("a", "b", "c")),
        ("a \\\n  b", ("a", "b")),
        ("a 'b c' \"d e\"", ("a", "b c", "d e")),
        ("a b\\ c", ("a", "b c")),
        ("a --x='1'\"2\"3", ("a", "--x=123")),
        ("a '{\"k\": [1, 2]}'", ("a", '{"k": [1, 2]}')),
        ("X=1\na $X ${X} \"$X\" '$X'", ("a", "1", "1", "1", "$X")),
        ('X="b c"\na $X "$X"', ("a", "b", "c", "b c")),
        ("X=b\na $X-c d$X", ("a", "b-c", "db")),
        ("a ${X:-b}", ("a", "b")),
        ('a ${X:-"b"}', ("a", "b")),
        ("X=\na ${X:-b} ${X-c}d", ("a", "b", "d")),
        ("X=2\na $((X + 1)) $(($X * 3)) $((7 / X))", ("a", "3", "6", "3")),
        ("X=2\nY=$((X*X))\na $Y", ("a", "4")),
        ("export X=b\na $X", ("a", "b")),
        ('a "q\\"r" "s\\$t"', ("a", 'q"r', "s$t")),
        ("a b # c d", ("a", "b")),
        ("a b#c", ("a", "b#c")),
        ("a b > log 2>&1", ("a", "b")),
        ("a b >> 'my log'", ("a", "b")),
        ("a b < in", ("a", "b")),
        ("L=(b 'c d'\n e) # f\na \"${L[@]}\"", ("a", "b", "c d", "e")),
        ('L=(b)\nL+=(c)\na "${L[@]}" d', ("a", "b", "c", "d")),
        ('L=()\na "${L[@]}" d', ("a", "d")),
        ("X=b\nX+=c\na $X", ("a", "bc")),
        ("a ''", ("a", "")),
        ("a $UNKNOWN $(date) `date` $1", ("a", "$UNKNOWN", "$(date)", "`date`", "$1")),
    ],
)
def test_the_words_of_the_last_command(text, expected):
    assert words(text)[-1] == expected


def test_commands_end_at_operators():
    assert words("a 1; b 2 && c 3 || d 4 | e 5 & f 6\ng 7") == [
        (name, str(number)) for number, name in enumerate("abcdefg", start=1)
    ]


def test_here_documents_are_no_commands():
    assert words("cat <<END > f\nit's $x (\nEND\na b") == [("cat",), ("a", "b")]


def test_variables_before_and_exported():
    command = list(read_commands("export A=1\nB=2\nC=3 D='4 5' run $B"))[-1]
    assert command.words == ("run", "2") and command.environment == {"A": "1", "C": "3", "D": "4 5"}
    assert command.line == 3


@pytest.mark.parametrize("word", ["$X", "a${X}b", "$(date)", "`date`", "$1", "$@", "${L[@]}"])
def test_unknown_words(word):
    assert is_unknown(word)
    assert not is_unknown("a$") and not is_unknown("1$ 2")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a\nb 'c", "line 2: a quote (') is not closed"),
        ('a "b', 'line 1: a quote (") is not closed'),
        ("a ${b", "line 1: a bracket ({) is not closed"),
        ("a $(b", "line 1: a bracket (() is not closed"),
        ("L=(a", "line 1: a bracket (() is not closed"),
    ],
)
def test_texts_that_are_no_scripts(text, problem):
    with pytest.raises(ScriptProblem) as caught:
        list(read_commands(text))
    assert str(caught.value) == problem


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab $'\"\\\n#(){}[]=<>;&|:-+@`~1", max_size=40))
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(ScriptProblem):
        assert all(command.words for command in read_commands(text))


_SAFE = st.text(alphabet="ab $X'\"\\#=-", max_size=12)


@settings(max_examples=40, deadline=None)
@given(st.lists(_SAFE, min_size=1, max_size=4))
def test_quoted_words_are_those_of_the_shell(texts):
    """As `sh` itself splits them."""
    sh = shutil.which("sh")
    assert sh is not None
    quoted = ["'" + text.replace("'", "'\\''") + "'" for text in texts]
    script = "printf '%s\\n' " + " ".join(quoted)
    expected = subprocess.run([sh, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "\n".join(words(script)[-1][2:]) + "\n" == expected
