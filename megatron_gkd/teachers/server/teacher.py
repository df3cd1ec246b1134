"""A teacher behind vLLM servers: the top-k of its distributions over HTTP.

One rank of each model replica asks, the first of its last pipeline stage, and tells the others of that stage. Requests
start as soon as samples are known, up to a step ahead of the student. Whatever goes wrong in one rank is raised in all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_gkd.data.label_indices import local_label_indices
from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.data.sample import Sample
from megatron_gkd.data.teacher_view import teacher_view
from megatron_gkd.errors import GkdError
from megatron_gkd.ops.topk import MISSING, TopK
from megatron_gkd.runtime.agreement import raise_together, run_on_main
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.runtime.servers import open_client
from megatron_gkd.teachers.base import TeacherFailed
from megatron_gkd.teachers.server.client import TeacherRequirements, TeacherServer, handshake_all
from megatron_gkd.teachers.server.requests import ScoreRequests
from megatron_gkd.teachers.server.response import Question, Scores
from megatron_gkd.teachers.server.tokenizer import tokenizer_probes

_MOST_AHEAD = 4  # times the questions of the largest scoring may wait to be collected


@dataclass(frozen=True)
class ServerOptions:
    """The servers, and how they are asked.

    Attributes:
        urls: of the servers' roots; sequences are dealt to them in turn.
        k: tokens of each distribution.
        max_length: tokens of the longest sequence.
        concurrency: requests of one replica at the same time, over all servers.
        timeout: seconds that one answer may take.
        patience: seconds that servers may be gone before the run stops.
        check_interval: scorings from one check to the next that every server still has the same model.
    """

    urls: tuple[str, ...]
    k: int
    max_length: int
    concurrency: int = 64
    timeout: float = 600.0
    patience: float = 300.0
    check_interval: int = 10


class ServerTeacher:
    """Waits until the servers answer. All ranks must make it together; `TeacherFailed` if a server can't be used.

    `tokenizer`: the student's, which the servers' must equal. `vocab_size`: ids from there on don't count.
    """

    def __init__(self, mesh: Mesh, tokenizer: PreTrainedTokenizerBase, vocab_size: int, options: ServerOptions):
        self.mesh, self.vocab_size, self.options = mesh, vocab_size, options
        self.requests: ScoreRequests | None = None
        self.largest = options.concurrency
        """Most questions of one scoring so far, or a few."""
        servers: list[TeacherServer] = []
        if self.mesh.is_leader or mesh.is_main:
            http = open_client(options.timeout, options.concurrency)
            needs = TeacherRequirements(options.k, options.max_length, tokenizer_probes(tokenizer))
            servers = [TeacherServer(url, http, needs) for url in options.urls]
        identities = run_on_main(lambda: handshake_all(servers, options.patience), TeacherFailed)
        self.scorings = 0
        if self.mesh.is_leader:
            for server, identity in zip(servers, identities, strict=True):
                server.identity = identity
            self.requests = ScoreRequests(
                servers, concurrency=options.concurrency, patience=options.patience, first=mesh.dp.rank()
            )

    def resident(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def begin(self, samples: Iterable[Sample]) -> None:
        """As `ScoresAhead.begin`."""
        if self.requests is not None:
            self.requests.begin(filter(None, map(_question, samples)))

    def score(self, microbatches: Sequence[Microbatch]) -> list[TopK | None]:
        """As `TeacherSource.score`; values are log-probabilities at temperature 1, [N, k]."""
        questions = [_question(sample) for microbatch in microbatches for sample in microbatch.samples]
        asked = [question for question in questions if question is not None]
        told = self._tell_last_stage(self._collect(asked), asked, microbatches[0].labels.device)
        if told is None:
            return [None] * len(microbatches)
        pieces = told.split([microbatch.num_labels for microbatch in microbatches], dim=1)
        return [self._signal(piece, one) for piece, one in zip(pieces, microbatches, strict=True)]

    def _collect(self, asked: list[Question]) -> dict[bytes, Scores]:
        """The answers on the speaker, nothing elsewhere. All ranks call it together."""
        scores: dict[bytes, Scores] = {}
        gifts: dict[bytes, int] = {}
        problem = None
        if self.mesh.is_leader:
            wanted = {question.key: question for question in asked}
            begun = self.requests.begun()
            gifts = self._gifts(wanted.keys() - begun.keys(), begun.keys() - wanted.keys())
            me = self.mesh.dp.rank()
            mine = [question for key, question in wanted.items() if key in begun or key not in gifts]
            mine += [begun[key] for key, giver in gifts.items() if giver == me]
            try:
                scores = self.requests.collect(mine)
            except GkdError as error:
                problem = str(error)
            self.largest = max(self.largest, len(wanted))
            self.requests.forget_all_but(_MOST_AHEAD * self.largest)
        raise_together(problem, TeacherFailed)
        self._check_servers()
        if gifts:
            given = {key: scores[key] for key, giver in gifts.items() if giver == me}
            everything: list[dict[bytes, Scores]] = [{} for _ in range(self.mesh.dp.size())]
            dist.all_gather_object(everything, given, group=self.mesh.dp)
            scores |= {key: score for part in everything for key, score in part.items()}
        return scores

    def _check_servers(self) -> None:
        """Check every `check_interval`-th time that the servers have the same model; each is checked by one replica.

        After the answers, so that those of this scoring are checked, too. All ranks call it together.
        """
        self.scorings += 1
        if self.scorings % self.options.check_interval:
            return
        problem = None
        if self.mesh.is_leader:
            replica = self.mesh.dp
            try:
                for server in self.requests.servers[replica.rank() :: replica.size()]:
                    server.check()
            except GkdError as error:
                since = f"; {self.options.check_interval} steps at most were scored since the last check"
                problem = f"{error}{since if self.options.check_interval > 1 else ''}"
        raise_together(problem, TeacherFailed)

    def _gifts(self, missing: Iterable[bytes], spare: Iterable[bytes]) -> dict[bytes, int]:
        """Who gives what to others: a replica may train on samples that another has begun, as it sampled them.

        The same on all speakers: keys that a replica is `missing` and another has to `spare`, and the giver's rank.
        """
        if self.mesh.dp.size() == 1:
            return {}
        everything: list[tuple[set[bytes], set[bytes]]] = [(set(), set())] * self.mesh.dp.size()
        dist.all_gather_object(everything, (set(missing), set(spare)), group=self.mesh.dp)
        needed = set().union(*(missing for missing, _ in everything))
        givers = {key: rank for rank, (_, spare) in enumerate(everything) for key in spare & needed}
        return dict(sorted(givers.items()))

    def _tell_last_stage(
        self, scores: dict[bytes, Scores], asked: list[Question], device: torch.device
    ) -> Tensor | None:
        """int32 [2, labels of all microbatches, k], ids and the bits of log-probabilities; None on other stages."""
        if not self.mesh.is_last_stage:
            return None
        told = torch.empty(2, sum(len(question.positions) for question in asked), self.options.k, dtype=torch.int32)
        if self.mesh.is_leader and asked:
            in_order = [scores[question.key] for question in asked]
            np.concatenate([one.ids for one in in_order], out=told[0].numpy())
            np.concatenate([one.log_probs for one in in_order], out=told[1].view(torch.float32).numpy())
        told = told.to(device)
        for group, take_part in ((self.mesh.cp, self.mesh.tp.rank() == 0), (self.mesh.tp, True)):
            if take_part and group.size() > 1 and told.numel():
                dist.broadcast(told, src=dist.get_global_rank(group, 0), group=group)
        return told

    def _signal(self, told: Tensor, microbatch: Microbatch) -> TopK:
        """This rank's rows of a microbatch's [2, labels, k]."""
        numbers = local_label_indices(microbatch, self.mesh.cp.rank(), self.mesh.cp.size()).to(told.device)
        ids, log_probs = told[0, numbers].long(), told[1, numbers].view(torch.float32)
        return TopK.from_log_probs(ids.masked_fill(ids >= self.vocab_size, MISSING), log_probs)


def _question(sample: Sample) -> Question | None:
    """About what the teacher reads, where it has a prompt of its own; the labels are the same."""
    return Question.of(teacher_view(sample))
