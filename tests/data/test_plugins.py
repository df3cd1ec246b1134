import pytest

from megatron_gkd.data import plugins, register_preprocessor
from megatron_gkd.data.plugins import find_preprocessor, load_plugins
from megatron_gkd.errors import UserError


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(plugins, "_preprocessors", {})


@pytest.fixture
def plugin(tmp_path):
    def write(text, name="plugin.py"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def test_a_plugin_file_registers_a_preprocessor_and_is_run_once(plugin):
    path = plugin(
        "from megatron_gkd.data import register_preprocessor\n"
        "@register_preprocessor('upper')\n"
        "def upper(row):\n"
        "    return {key: value.upper() for key, value in row.items()}\n"
    )
    load_plugins([path])
    load_plugins([path])  # a second run would register the name twice, which is an error
    assert find_preprocessor("upper")({"prompt": "a"}) == {"prompt": "A"}


def test_a_name_is_registered_once():
    register_preprocessor("mine")(dict)
    with pytest.raises(UserError, match="two preprocessors are registered as 'mine'"):
        register_preprocessor("mine")(dict)


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(UserError, match=r"'x' is not registered \(registered: none; register one in a file"):
        find_preprocessor("x")
    register_preprocessor("question_answer")(dict)
    with pytest.raises(UserError, match=r"\(registered: question_answer\); did you mean 'question_answer'\?"):
        find_preprocessor("question_answers")


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("1 / 0", "plugin.py", "plugin.py: ZeroDivisionError: division by zero"),
        ("def", "plugin.py", "plugin.py: SyntaxError: invalid syntax"),
        ("", "plugin.txt", "plugin.txt: not a Python file"),
    ],
)
def test_a_file_that_cannot_be_run(plugin, text, name, message):
    with pytest.raises(UserError, match=message):
        load_plugins([plugin(text, name)])


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"external_plugins: .*missing.py: no such file"):
        load_plugins([str(tmp_path / "missing.py")])
