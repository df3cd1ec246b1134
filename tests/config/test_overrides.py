import pytest


@pytest.mark.parametrize(
    "arguments", [["--beta", "1.0"], ["--distill.beta", "1.0"], ["--beta=1.0"], ["--distill.beta=1"]]
)
def test_a_leaf_with_or_without_its_section(workspace, arguments):
    assert workspace.load(*arguments).distill.beta == 1.0


def test_values_are_yaml(workspace):
    recipe = workspace.load(
        *("--lr", "2e-5", "--save_interval", "null", "--chat_template_kwargs", "{enable_thinking: false}"),
        *("--adam-eps", "1e-6", "--lr_warmup_fraction", "0.1"),
    )
    assert recipe.train.lr == 2e-5
    assert recipe.output.save_interval is None
    assert recipe.data.chat_template_kwargs == {"enable_thinking": False}
    assert recipe.train.adam_eps == 1e-6, "dashes may stand for underscores"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--dataset", "[val.jsonl, train.jsonl]"],
        ["--dataset", "val.jsonl", "train.jsonl"],
        ["--dataset=val.jsonl", "train.jsonl"],
    ],
)
def test_lists_as_yaml_or_as_several_values(workspace, arguments):
    assert [entry.path for entry in workspace.load(*arguments).data.dataset] == ["val.jsonl", "train.jsonl"]


def test_lists_of_other_things(workspace):
    rollout = workspace.load("--stop_token_ids", "5", "--stop_words", '"\\n\\n"', "</s>").rollout
    assert rollout.stop_token_ids == (5,) and rollout.stop_words == ("\n\n", "</s>")
    wrong = workspace.problems("--stop_token_ids", "[5, -1]", "--stop_words", "[a, '']", "--vllm_server_urls", "host:1")
    assert [problem.split(": ")[-1] for problem in wrong] == [
        "must be a list of token ids",
        "must be a list of texts",
        "must be a list of addresses (http://host:port, also with a path)",
    ]


def test_a_list_of_weighted_values(workspace):
    dataset = workspace.load("--dataset", "{path: val.jsonl, weight: 2}", "train.jsonl").data.dataset
    assert [(entry.path, entry.weight) for entry in dataset] == [("val.jsonl", 2.0), ("train.jsonl", 1.0)]


@pytest.mark.parametrize(
    ("arguments", "value"), [(["--packing"], True), (["--packing", "false"], False), (["--packing=yes"], True)]
)
def test_booleans_bare_or_with_a_value(workspace, arguments, value):
    assert workspace.load(*arguments, "--log_interval", "3").data.packing is value


def test_text_is_not_parsed_as_yaml(workspace):
    """As YAML, 2024_01 would be the number 202401 and 1e-4 a float."""
    assert workspace.load("--output_dir", "2024_01").output.output_dir == "2024_01"
    assert workspace.load("--output_dir", "1e-4").output.output_dir == "1e-4"
    assert workspace.load("--preprocessor", "null").data.preprocessor is None


def test_the_last_of_two_wins(workspace):
    assert workspace.load("--beta", "0", "--beta", "1").distill.beta == 1.0


def test_an_override_replaces_a_wrong_value_of_the_file(workspace):
    workspace.recipe.write_text(workspace.recipe.read_text().replace("beta: 0.5", "beta: 7"))
    assert workspace.load("--beta", "0.1").distill.beta == 0.1


def test_a_section_that_the_file_leaves_empty(workspace):
    text = workspace.recipe.read_text()
    workspace.recipe.write_text("".join(line for line in text.splitlines(True) if "distill" not in line) + "distill:\n")
    assert workspace.load("--beta", "0.25").distill.beta == 0.25


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--bteta", "1"], "--bteta: unknown key; did you mean distill.beta?"),
        (["--train.beta", "1"], "--train.beta: unknown key; beta belongs in the section distill"),
        (["--a.b.beta", "1"], "--a.b.beta: unknown key; beta belongs in the section distill"),
        (["--beta"], "--beta: needs a value: a number in [0, 1]"),
        (["--beta", "0.1", "0.2"], "--beta: takes one value, not 2 (0.1 0.2)"),
        (["stray", "--beta", "1"], "stray: unexpected argument; overrides are --leaf value"),
        (["--beta", "-1"], "distill.beta = -1: must be a number in [0, 1]"),
        (["--chat_template_kwargs", "{a"], "--chat_template_kwargs: line 1: "),
        (["--max_length", "[1"], "--max_length: line 1: "),
    ],
)
def test_wrong_overrides(workspace, arguments, problem):
    (found,) = workspace.problems(*arguments)
    assert found.startswith(problem)
    assert "\n" not in found
