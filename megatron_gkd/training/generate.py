"""Answers of a model to the prompts of the data set, as rows of token ids to train on."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import megatron_gkd.runtime.preload  # noqa: F401  isort: skip  (before anything that imports Megatron-Core)

import numpy as np
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_gkd.config.schema import Recipe
from megatron_gkd.data.loader import SampleDataset
from megatron_gkd.data.prompt import prompt_of, room_for_answer
from megatron_gkd.models.megatron_model import BuildOptions
from megatron_gkd.reporting.progress import Progress
from megatron_gkd.rollout.base import BackgroundEngine, Completion, RolloutEngine, check_completions
from megatron_gkd.rollout.megatron.engine import MegatronEngine
from megatron_gkd.rollout.vllm.own_weights import OwnWeightsEngine
from megatron_gkd.runtime.agreement import run_on_main
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.runtime.servers import open_client
from megatron_gkd.teachers.server.client import TeacherRequirements, TeacherServer, handshake_all
from megatron_gkd.teachers.server.tokenizer import tokenizer_probes
from megatron_gkd.training.build import DTYPES, build_engine, sampling_of, server_options
from megatron_gkd.training.generated_file import GeneratedFile
from megatron_gkd.training.load_model import load_model
from megatron_gkd.training.setup import Models, open_models, open_rows, world_of

Source = Literal["teacher", "student"]
_KNOWN_TOKENS = 5  # of each distribution of a known prompt, by which a teacher's server is recognized
_STREAM = 0x67656E  # keeps these draws apart from those of training, which start from the same seed


def generate(recipe: Recipe, source: Source, output: str, n: int, chunk_rows: int) -> None:
    """Write `n` answers to each prompt into the file `output`, or what is missing there, in the order of the rows.

    An answer follows from the recipe's seed, the row and its number; with engine megatron to the bit.
    """
    with world_of(recipe) as mesh:
        models = open_models(recipe, mesh)
        dataset, _ = open_rows(recipe, mesh, models, "train", prompts=True)
        name = _model_name(recipe, source)
        file = GeneratedFile(Path(output).expanduser(), chunk_rows, settings_of(recipe, name, n, dataset))
        engine = build_engine_of(source, recipe, mesh, models)
        closing = contextlib.closing(engine) if isinstance(engine, BackgroundEngine) else contextlib.nullcontext()
        with closing:
            is_served = source == "teacher" and recipe.teacher.source == "server"
            verify = _verify_teacher(recipe, mesh, models.tokenizer) if is_served else lambda: None
            answers = Answers(recipe, mesh, dataset, engine, models.tokenizer, n, name, vocab_size=models.vocab_size)
            write_answers(file, answers, verify)


def write_answers(file: GeneratedFile, answers: Answers, verify: Callable[[], None] = lambda: None) -> None:
    """Append what `file` lacks. All ranks must call it.

    `verify` raises UserError if the answers that were made last are not the model's; the main rank calls it.
    """
    mesh, total = answers.mesh, len(answers.dataset)
    first = run_on_main(file.resume) * file.chunk_rows
    with Progress(total, mesh.is_main, description="generating", unit="row") as progress:
        for start in range(first, total, file.chunk_rows):
            rows = range(start, min(start + file.chunk_rows, total))
            found = answers.of(rows)
            run_on_main(verify)
            run_on_main(lambda found=found: file.append(answers.as_rows(found)))
            progress.update(rows[-1] + 1, {})
        progress.message(f"answers {file.path}: {answers.n} to each of {total} prompts")


def settings_of(recipe: Recipe, model: str, n: int, dataset: SampleDataset) -> dict[str, Any]:
    """All that decides what the file holds."""
    section = recipe.rollout
    sampling = ("max_completion_length", "rollout_temperature", "top_k", "top_p", "truncated", "stop_token_ids", "stop")
    return {
        "model": model,
        "n": n,
        "seed": recipe.train.seed,
        "dtype": recipe.train.dtype,
        "max_length": recipe.data.max_length,
        **{name: section.model_dump(mode="json")[name] for name in sampling},
        "dataset": [entry.path for entry in recipe.data.dataset],
        "rows": hashlib.blake2b(dataset.lengths.tobytes(), digest_size=16).hexdigest(),
    }


def _model_name(recipe: Recipe, source: Source) -> str:
    teacher = recipe.teacher
    if source == "student":
        model, adapters = recipe.student.model, None if recipe.lora is None else recipe.lora.adapters
    else:
        model, adapters = teacher.teacher_model or teacher.teacher_model_server[0], teacher.teacher_adapters
    return model if adapters is None else f"{model} with {adapters}"


def build_engine_of(source: Source, recipe: Recipe, mesh: Mesh, models: Models) -> RolloutEngine:
    """Build the engine that answers, with the weights of `source` loaded.

    The student has the adapters that it would begin with. Servers of rollouts get its weights as in training, whatever
    they held before. Servers of a teacher answer with the weights that they were started with.
    """
    section = recipe.teacher
    if source == "teacher" and section.source == "server":
        return OwnWeightsEngine(mesh, models.student, server_options(recipe, section.teacher_model_server))
    checkpoint = models.student if source == "student" else models.teachers["teacher"]
    if source == "student" and recipe.lora is not None and recipe.lora.adapters is not None:
        checkpoint = checkpoint.with_adapters(Path(recipe.lora.adapters), "lora.adapters")
    options = BuildOptions(dtype=DTYPES[recipe.train.dtype], attn=recipe.train.attention_backend)
    model = load_model(f"the {source} {_model_name(recipe, source)}", checkpoint, mesh, options)
    if source == "teacher" and recipe.rollout.engine == "vllm_server":  # the servers are the student's
        return MegatronEngine(model, checkpoint.eos_token_ids)
    engine = build_engine(recipe, mesh, model, checkpoint)
    engine.load_weights(model.named_tensors(), version=0)
    return engine


def _verify_teacher(recipe: Recipe, mesh: Mesh, tokenizer: PreTrainedTokenizerBase) -> Callable[[], None]:
    """Make the handshake of scoring with the teacher's servers. All ranks call it together.

    Returns what raises UserError on the main rank if a server has another model since.

    Raises:
        UserError: in all ranks; a server's tokenizer is not the student's, or the servers have different models.
    """
    section, data = recipe.teacher, recipe.data
    servers: list[TeacherServer] = []
    if mesh.is_main:
        http = open_client(section.teacher_server_timeout_s, len(section.teacher_model_server))
        # The engine has compared the lengths, and needs one token less than scoring.
        k, max_length = recipe.distill.gkd_logits_topk or _KNOWN_TOKENS, data.max_length - 1
        needs = TeacherRequirements(k, max_length, tokenizer_probes(tokenizer))
        servers = [TeacherServer(url, http, needs) for url in section.teacher_model_server]
    patience = section.teacher_server_max_downtime_s
    run_on_main(lambda: handshake_all(servers, patience))

    def verify() -> None:
        for server in servers:
            server.verify(patience)

    return verify


class Answers:
    """The `n` answers of `model` to some rows, shared out over the data-parallel ranks and known to all of them.

    `vocab_size`: only ids below it may be in an answer; None: all.
    """

    def __init__(
        self,
        recipe: Recipe,
        mesh: Mesh,
        dataset: SampleDataset,
        engine: RolloutEngine,
        tokenizer: PreTrainedTokenizerBase,
        n: int,
        model: str,
        *,
        vocab_size: int | None = None,
    ):
        self.recipe, self.mesh, self.dataset, self.engine = recipe, mesh, dataset, engine
        self.tokenizer, self.n, self.model = tokenizer, n, model
        self.sampling = sampling_of(recipe.rollout, vocab_size)

    def of(self, rows: Sequence[int]) -> list[tuple[int, int, Completion]]:
        """(row, number from 0, answer), in this order. All ranks must call it together.

        Raises:
            UserError: in all ranks; a prompt leaves no room for an answer.
        """
        samples = {row: self.dataset[row] for row in rows}
        data = self.recipe.data
        limits = data.max_length, data.teacher_max_length or data.max_length
        rooms = {row: room_for_answer(sample, *limits) for row, sample in samples.items()}
        wanted = [(row, number) for row in rows for number in range(self.n)]
        dp = self.mesh.dp
        mine = wanted[dp.rank() :: dp.size()]
        with self.engine.resident():
            completions = self.engine.generate(
                [prompt_of(samples[row]).tolist() for row, _ in mine],
                self.sampling,
                [self._seed(*which) for which in mine],
            )
        found = [
            (row, number, completion.within(rooms[row]))
            for (row, number), completion in zip(mine, completions, strict=True)
        ]
        everything: list[list] = [[] for _ in range(dp.size())]
        dist.all_gather_object(everything, found, group=dp)
        answers = sorted((answer for part in everything for answer in part), key=lambda answer: answer[:2])
        check_completions((completion for *_, completion in answers), self.sampling.vocab_size)
        return answers

    def _seed(self, row: int, number: int) -> int:
        sequence = np.random.SeedSequence([self.recipe.train.seed, _STREAM, row, number])
        return int(sequence.generate_state(1, np.uint64)[0] >> 1)

    def as_rows(self, answers: Sequence[tuple[int, int, Completion]]) -> list[dict[str, Any]]:
        """As they stand in the file. What counts are the ids; the texts are for people to read."""
        truncated, tag_key = self.recipe.rollout.truncated_completions, self.recipe.teacher.teacher_tag_key
        rows = []
        for row, number, completion in answers:
            is_cut = completion.finish_reason == "length"
            if is_cut and truncated == "drop":
                continue
            sample = self.dataset[row]
            prompt = prompt_of(sample).tolist()
            record = {
                "row": row,
                "number": number,
                "prompt": self.tokenizer.decode(prompt),
                "response": self.tokenizer.decode(completion.token_ids),
                "prompt_token_ids": prompt,
                "response_token_ids": list(completion.token_ids),
                "finish_reason": completion.finish_reason,
                "model": self.model,
                "version": completion.version,
            }
            if sample.teacher_prompt is not None:
                record["teacher_prompt_token_ids"] = sample.teacher_prompt.tolist()
            if tag_key is not None and sample.tag is not None:
                record[tag_key] = sample.tag
            if is_cut and truncated == "mask":
                record["masked"] = True
            rows.append(record)
        return rows
