"""Addresses of servers, and the environment variables with their API keys."""

import pytest

from megatron_gkd.config import commands
from megatron_gkd.config.checks import TRAIN, find_problems

TEACHER = [
    "--teacher_model",
    "null",
    "--offload_teacher_model",
    "false",
    "--gkd_logits_topk",
    "8",
    "--teacher_model_server",
]
ROLLOUTS = ["--engine", "vllm_server", "--lmbda", "1", "--vllm_server_urls"]


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("http://host:8000", "http://host:8000"),
        ("http://host:8000/", "http://host:8000"),
        ("http://host:8000/v1", "http://host:8000"),
        ("http://host:8000/v1/", "http://host:8000"),
        ("https://host/teacher", "https://host/teacher"),
        ("https://host/a/b/v1/", "https://host/a/b"),
        ("https://host/v1beta", "https://host/v1beta"),
        ("http://[::1]:8000/v1", "http://[::1]:8000"),
    ],
)
def test_an_address_may_have_a_path_and_v1_is_left_out(url, root, workspace):
    recipe = workspace.load(*TEACHER, f'["{url}"]')
    assert recipe.teacher.teacher_model_server == (root,)
    recipe = workspace.load(*ROLLOUTS, f'["{url}"]')
    assert recipe.rollout.vllm_server_urls == (root,)
    assert "/v1/" not in recipe.to_yaml() and f"{root}" in recipe.to_yaml()


@pytest.mark.parametrize(
    "url",
    [
        "host:8000",
        "ftp://host",
        "http://",
        "http:///v1",
        "http://host/a b",
        "http://host?x=1",
        "http://u:secret@host",
        "http://a:99999",
        "http://a:0",
    ],
)
def test_what_is_no_address_is_refused(url, workspace):
    (problem,) = workspace.problems(*TEACHER, f'["{url}"]')
    assert problem.startswith("teacher.teacher_model_server") and "http://host:port" in problem


def test_one_server_under_two_addresses_is_named_twice(workspace):
    (problem,) = workspace.problems(*TEACHER, "[http://a:1, http://a:1/v1]")
    assert problem == "teacher.teacher_model_server = ['http://a:1', 'http://a:1']: must name every server once"


NAMED = {
    "teacher.teacher_server_api_key_env": [*TEACHER, "http://a:1", "--teacher_server_api_key_env"],
    "rollout.vllm_server_api_key_env": [*ROLLOUTS, "http://a:1", "--vllm_server_api_key_env"],
}


@pytest.mark.parametrize("key", NAMED)
def test_the_variable_of_an_api_key_is_set(key, workspace, monkeypatch):
    arguments = [*NAMED[key], "SERVER_KEY"]
    monkeypatch.delenv("SERVER_KEY", raising=False)
    hint = "export the servers' API key in it, on every node"
    unset = f"{key} = SERVER_KEY: this environment variable is not set; {hint}"
    assert workspace.problems(*arguments) == [unset]
    assert workspace.problems(*arguments, require_paths=False) == [], "on another machine"
    monkeypatch.setenv("SERVER_KEY", "")
    assert workspace.problems(*arguments) == [unset.replace("not set", "empty")]
    monkeypatch.setenv("SERVER_KEY", "sk-secret")
    assert workspace.problems(*arguments) == []
    assert "secret" not in workspace.load(*arguments).to_yaml()


BOTH = [*TEACHER, "http://a:1", "--teacher_server_api_key_env", "TEACHER_KEY", *ROLLOUTS, "http://a:1"]
BOTH += ["--vllm_server_api_key_env", "ROLLOUT_KEY"]


@pytest.mark.parametrize(
    ("command", "variables"),
    [
        (TRAIN, ["TEACHER_KEY", "ROLLOUT_KEY"]),
        (commands.SCORES, ["TEACHER_KEY"]),
        (commands.TEACHER_GENERATES, ["TEACHER_KEY"]),
        (commands.STUDENT_GENERATES, ["ROLLOUT_KEY"]),
        (commands.PLANS, []),
        (commands.EXPORTS, []),
    ],
)
def test_a_command_needs_the_api_keys_of_the_servers_that_it_contacts(command, variables, workspace, monkeypatch):
    for name in ("TEACHER_KEY", "ROLLOUT_KEY"):
        monkeypatch.delenv(name, raising=False)
    recipe = workspace.load(*BOTH, require_paths=False)
    problems = find_problems(recipe, 2, command=command)
    found = [problem for problem in problems if "environment variable is not set" in problem]
    assert [problem.split()[2].rstrip(":") for problem in found] == variables


def test_training_without_samples_contacts_no_rollout_server(workspace, monkeypatch):
    monkeypatch.delenv("ROLLOUT_KEY", raising=False)
    arguments = [*ROLLOUTS, "http://a:1", "--vllm_server_api_key_env", "ROLLOUT_KEY"]
    assert workspace.problems(*arguments, "--lmbda", "0") == []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--sleep_level", "1"], "rollout.sleep_level = 1: only with rollout.engine = vllm"),
        (["--enforce_eager"], "rollout.enforce_eager = true: only with rollout.engine = vllm"),
        (["--vllm_max_model_len", "64"], "rollout.vllm_max_model_len = 64: only with rollout.engine = vllm"),
        (["--vllm_server_concurrency", "9"], "rollout.vllm_server_concurrency = 9: only with rollout.engine = "
         "vllm_server"),
        (["--teacher_server_check_interval", "9"], "teacher.teacher_server_check_interval = 9: only with "
         "teacher.teacher_kind = server"),
        (["--teacher_fp8_recipe", "tensorwise"], "teacher.teacher_fp8_recipe = tensorwise: only with "
         "teacher.teacher_fp8_format"),
    ],
)  # fmt: skip
def test_keys_of_what_is_not_used_are_refused(arguments, problem, workspace):
    assert workspace.problems(*arguments) == [problem]


@pytest.mark.parametrize("key", NAMED)
def test_an_api_key_in_the_recipe_is_refused_and_not_shown(key, workspace):
    (problem,) = workspace.problems(*NAMED[key], "sk-secret")
    assert problem == (
        f"{key} = (not shown): must be the name of an environment variable; the API key itself is never in a recipe"
    )


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ["--teacher_server_api_key_env", "K"],
            "teacher.teacher_server_api_key_env = K: only with teacher.teacher_kind = server",
        ),
        (
            ["--vllm_server_api_key_env", "K"],
            "rollout.vllm_server_api_key_env = K: only with rollout.engine = vllm_server",
        ),
    ],
)
def test_a_key_without_servers_is_refused(arguments, problem, workspace):
    assert workspace.problems(*arguments) == [problem]
