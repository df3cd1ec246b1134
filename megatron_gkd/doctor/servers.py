"""The teacher servers and rollout servers of a recipe, by the handshakes that a run makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from megatron_gkd.config.api_keys import ApiKeyVariable
from megatron_gkd.config.schema import Recipe
from megatron_gkd.doctor.finding import Check, Finding
from megatron_gkd.doctor.processes import Outcome
from megatron_gkd.doctor.subject import Subject
from megatron_gkd.errors import GkdError, ServiceError

Handshake = tuple[str, str | None]
"""The name of the server's model, and what a run would warn of."""

_RESPONSE_SECONDS = 30.0
_START = "start the server, or correct the address"


def checks_of(subject: Subject) -> list[Check]:
    """Return a check for each server that the recipe names."""
    recipe = subject.recipe
    if recipe is None:
        return []
    checks = []
    for place, teacher in recipe.teacher.all.items():
        for url in teacher.teacher_model_server if teacher.source == "server" else ():
            checks.append(_check(f"{place}.teacher_model_server {url}", partial(handshake_with_teacher, url, place)))
    if recipe.distill.lmbda > 0 and recipe.rollout.engine == "vllm_server":
        for url in recipe.rollout.vllm_server_urls:
            checks.append(_check(f"rollout.vllm_server_urls {url}", partial(handshake_with_rollout, url)))
    return checks


def _check(name: str, handshake: Callable[[Recipe], Handshake]) -> Check:
    def find(subject: Subject) -> Iterator[Finding]:
        if subject.recipe is None:
            return
        if isinstance(subject.torch, Outcome):
            yield Finding(name, "warning", "not checked: torch can't be used", "see the line of torch")
            return
        try:
            model, warning = handshake(subject.recipe)
            if warning is None:
                yield Finding(name, "ok", f"serves {model}")
            else:
                yield Finding(name, "warning", f"serves {model}; {warning}", "expected with check_tokenizers = warn")
        except ServiceError as error:
            yield Finding(name, "failed", str(error), _START)
        except GkdError as error:
            yield Finding(name, "failed", str(error), "start it with the options that the message names")

    return Check(name, find, seconds=90.0)


def handshake_with_teacher(url: str, place: str, recipe: Recipe) -> Handshake:
    """Make a teacher server's handshake, once.

    Args:
        url: of the server.
        place: the teacher's key in the recipe.
        recipe: names the teacher.

    Raises:
        GkdError: the server is not there, or a run can't use it.
    """
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.runtime.hubs import ModelSource
    from megatron_gkd.runtime.servers import open_client
    from megatron_gkd.teachers.server.client import TeacherRequirements, TeacherServer
    from megatron_gkd.teachers.server.tokenizer import tokenizer_probes

    teacher, mode = recipe.teacher.all[place], recipe.teacher.check_tokenizers
    tokenizer = Checkpoint.open(ModelSource.of_student(recipe.student)).tokenizer()
    longest = max(recipe.data.max_length, recipe.data.teacher_max_length or 0)
    k, probes = recipe.distill.gkd_logits_topk or 1, tokenizer_probes(tokenizer)
    api_key = ApiKeyVariable(f"{place}.teacher_server_api_key_env", teacher.teacher_server_api_key_env).read()
    with open_client(_RESPONSE_SECONDS, 1, api_key) as http:
        requirements = TeacherRequirements(k, longest, probes, check_tokenizers=mode)
        identity = TeacherServer(url, http, requirements).handshake(max_downtime=0)
    if not identity.differences:
        return identity.name, None
    return identity.name, f"its tokenizer differs from the student's: {identity.differences[0].line()}"


def handshake_with_rollout(url: str, recipe: Recipe) -> Handshake:
    """Make a rollout server's handshake, once.

    Raises:
        GkdError: the server is not there, or a run can't use it.
    """
    from megatron_gkd.rollout.vllm.client import StudentServer
    from megatron_gkd.runtime.servers import open_client
    from megatron_gkd.training.build import server_options

    def send_nothing(server: StudentServer) -> None:
        raise RuntimeError("a check sends no weights")

    options = server_options(recipe, [url])
    with open_client(_RESPONSE_SECONDS, 1, options.api_key.read()) as http:
        return StudentServer(url, http, 0, send_nothing).wait_until_ready(options.requirements()).name, None
