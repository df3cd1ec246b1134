"""Write a model's responses to the prompts of the dataset, as rows of token ids to train on."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_gkd.config.api_keys import ApiKeyVariable
from megatron_gkd.config.schema import Recipe
from megatron_gkd.data.loader import SampleDataset
from megatron_gkd.data.prompt import extract_prompt
from megatron_gkd.reporting.progress import Progress
from megatron_gkd.rollout.base import BackgroundEngine
from megatron_gkd.runtime.agreement import run_on_main
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.runtime.servers import open_client
from megatron_gkd.teachers.base import TeacherFailed
from megatron_gkd.teachers.server.client import TeacherRequirements, TeacherServer, handshake_all, warn_of_tokenizers
from megatron_gkd.teachers.server.tokenizer import tokenizer_probes
from megatron_gkd.training.build import sampling_of
from megatron_gkd.training.completion_sampler import CompletionSampler
from megatron_gkd.training.ends import CompletionEnds
from megatron_gkd.training.generated_file import PROMPTS, GeneratedFile
from megatron_gkd.training.generated_rows import GeneratedResponse, ResponseGenerator, RowFormatter
from megatron_gkd.training.generation_engine import Source, build_generation_engine, source_name
from megatron_gkd.training.setup import open_models, open_rows, world_of
from megatron_gkd.training.teacher_rows import check_rows, refuse_videos, require_few_images

_KNOWN_TOKENS = 5  # of each distribution of a known prompt, by which a teacher's server is recognized


def generate(recipe: Recipe, source: Source, output: str, n: int, chunk_rows: int) -> None:
    """Write `n` responses to each prompt into the file `output`, or what is missing there, in the order of the rows.

    A response follows from the recipe's seed, the row and its number; with engine megatron to the bit.
    """
    with world_of(recipe) as mesh:
        models = open_models(recipe, mesh)
        dataset, report = open_rows(recipe, models, "train", all_completed=True)
        ends = CompletionEnds.find(recipe, models, report)
        refuse_videos(dataset)
        require_few_images(recipe, dataset)
        if source == "teacher":
            check_rows(recipe.teacher, dataset, models.teachers)
        name = source_name(recipe, source)
        file = GeneratedFile(Path(output).expanduser(), chunk_rows, settings_of(recipe, name, n, dataset, ends))
        engine = build_generation_engine(source, recipe, mesh, models)
        closing = contextlib.closing(engine) if isinstance(engine, BackgroundEngine) else contextlib.nullcontext()
        with closing:
            is_served = source == "teacher" and recipe.teacher.source == "server"
            verify = verify_teacher(recipe, mesh, models.tokenizer) if is_served else lambda: None
            sampling = sampling_of(recipe, ends.token_ids, models.vocab_size, models.find_reserved_ids())
            sampler = CompletionSampler(engine, sampling, mesh.dp)
            generator = ResponseGenerator(recipe, dataset, sampler, n)
            write_responses(file, generator, RowFormatter(recipe, dataset, models.tokenizer, name), mesh, verify)


def write_responses(
    file: GeneratedFile,
    generator: ResponseGenerator,
    formatter: RowFormatter,
    mesh: Mesh,
    verify: Callable[[], None] = lambda: None,
) -> None:
    """Append what `file` lacks. All ranks must call it.

    Args:
        file: of the rows.
        generator: of the responses.
        formatter: makes rows of them.
        mesh: of the ranks.
        verify: called on the main rank before a chunk is written; raises GkdError if its responses are of another
            model.

    Raises:
        TeacherFailed: in all ranks; `verify` has raised an error.
    """
    total = len(generator.dataset)
    first = run_on_main(file.resume) * file.chunk_rows
    with Progress(total, mesh.is_main, description="generating", unit="row") as progress:
        for start in range(first, total, file.chunk_rows):
            rows = range(start, min(start + file.chunk_rows, total))
            responses = generator.generate(rows)
            run_on_main(verify, TeacherFailed)
            run_on_main(partial(_append, file, formatter, responses))
            progress.update(rows[-1] + 1, {})
        progress.message(f"{file.path}: {generator.num_responses} responses to each of {total} prompts")


def _append(file: GeneratedFile, formatter: RowFormatter, responses: list[GeneratedResponse]) -> None:
    file.append(formatter.format(responses))


def settings_of(recipe: Recipe, model: str, n: int, dataset: SampleDataset, ends: CompletionEnds) -> dict[str, Any]:
    """Return all that the content of the file depends on."""
    section = recipe.rollout
    # Left out where they do nothing, as in files that were begun before there were these keys.
    later = {"min_p": (section.min_p, 0.0), "repetition_penalty": (section.repetition_penalty, 1.0)}
    return (
        {name: value for name, (value, default) in later.items() if value != default}
        | {
            "model": model,
            "n": n,
            "seed": recipe.train.seed,
            "dtype": recipe.train.dtype,
            "max_length": recipe.data.max_length,
            "max_completion_length": recipe.max_completion_length,
            "rollout_temperature": recipe.rollout_temperature,
            "top_k": section.top_k,
            "top_p": section.top_p,
            "truncated": section.truncated_completions,
            "stop_token_ids": list(section.stop_token_ids),
            "stop": list(section.stop_words),
            "dataset": [entry.path for entry in recipe.data.dataset],
            "rows": hashlib.blake2b(dataset.lengths.tobytes(), digest_size=16).hexdigest(),
            PROMPTS: _hash_prompts(dataset),
        }
        | ({"added_ends": list(ends.added)} if ends.added else {})
    )  # absent in files that earlier versions have begun


def _hash_prompts(dataset: SampleDataset) -> str:
    """Return a hash of about a thousand prompts, evenly spread: keys of the data may give others of equal lengths."""
    prompts = hashlib.blake2b(digest_size=16)
    for row in range(0, len(dataset), max(1, len(dataset) // 1000)):
        prompts.update(extract_prompt(dataset[row]).tobytes())
    return prompts.hexdigest()


def verify_teacher(recipe: Recipe, mesh: Mesh, tokenizer: PreTrainedTokenizerBase) -> Callable[[], None]:
    """Make the handshake of scoring with the teacher's servers. All ranks must call it together.

    Returns:
        A function for the main rank that raises GkdError if a server has another model since, or is down.

    Raises:
        TeacherFailed: in all ranks; a server's tokenizer is not the student's where check_tokenizers is strict, the
            servers have different models, or one does not respond.
    """
    section, data = recipe.teacher, recipe.data
    servers: list[TeacherServer] = []
    if mesh.is_main:
        api_key = ApiKeyVariable("teacher.teacher_server_api_key_env", section.teacher_server_api_key_env).read()
        http = open_client(section.teacher_server_timeout_s, len(section.teacher_model_server), api_key)
        # The engine has compared the lengths, and needs one token less than scoring.
        k, max_length = recipe.distill.gkd_logits_topk or _KNOWN_TOKENS, data.max_length - 1
        mode = section.check_tokenizers
        needs = TeacherRequirements(k, max_length, tokenizer_probes(tokenizer), check_tokenizers=mode)
        servers = [TeacherServer(url, http, needs) for url in section.teacher_model_server]
    max_downtime = section.teacher_server_max_downtime_s
    identities = run_on_main(lambda: handshake_all(servers, max_downtime), TeacherFailed)
    if mesh.is_main:
        warn_of_tokenizers(servers, identities)

    def verify() -> None:
        for server in servers:
            server.verify(max_downtime)

    return verify
