"""The student's weights to vLLM servers through vLLM's weight-transfer protocol: over nccl or gloo, without files.

The world's first rank gathers them into buffers of bytes. Servers are told over HTTP what is in the next buffer, and it
is broadcast to the workers of all of them at once. The same buffers stay in host memory, until the next version: a
server that has been restarted gets them from there, in a group of its own. Exporting again would take all ranks, which
may be in the middle of a training step, or waiting for the very answers that the server owes.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_gkd.errors import UserError
from megatron_gkd.rollout.background import each, in_background, together
from megatron_gkd.rollout.transfer_groups import GlooGroup, NcclGroup, TransferGroup
from megatron_gkd.rollout.vllm_client import ServerDown, StudentServer, Weights
from megatron_gkd.rollout.vllm_weights import Shapes, check_shapes

Backend = Literal["nccl", "gloo"]

_BUFFER_BYTES = 2**30
_UNFINISHED = "unfinished"  # a server's label from the first new tensor to the last


@dataclass(frozen=True)
class Buffer:
    """Tensors of one dtype, one after another as uint8 [bytes]."""

    names: list[str]
    shapes: list[list[int]]
    dtype: torch.dtype
    data: Tensor

    def update_info(self) -> dict[str, Any]:
        """For /update_weights."""
        name = str(self.dtype).removeprefix("torch.")
        return {"names": self.names, "dtype_names": [name] * len(self.names), "shapes": self.shapes}


def buffers(named_tensors: Iterable[tuple[str, Tensor]], most_bytes: int = _BUFFER_BYTES) -> Iterator[Buffer]:
    """The tensors in order, as many a buffer as `most_bytes` hold, and at least one."""
    part: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in named_tensors:
        if part and (size + tensor.nbytes > most_bytes or tensor.dtype != part[0][1].dtype):
            yield _buffer(part)
            part, size = [], 0
        part.append((name, tensor.detach()))
        size += tensor.nbytes
    if part:
        yield _buffer(part)


def _buffer(part: list[tuple[str, Tensor]]) -> Buffer:
    names, tensors = zip(*part, strict=True)
    data = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])
    return Buffer(list(names), [list(tensor.shape) for tensor in tensors], tensors[0].dtype, data)


class WeightTransfer:
    """On the world's first rank.

    Args:
        backend: what the servers were started with.
        expected, optional: as `WeightFolder` has them.
        timeout: seconds that one buffer may take.
    """

    def __init__(self, backend: Backend, expected: Shapes, optional: Collection[str], timeout: float):
        self.backend, self.expected, self.optional, self.timeout = backend, expected, optional, timeout
        self.run = secrets.token_hex(4)
        self._kept: list[Buffer] = []
        self._lock = threading.Lock()  # of the group: servers are sent to together, or one after another
        self._group: TransferGroup | None = None
        self._members: Sequence[StudentServer] = ()

    def load(
        self, named_tensors: Iterable[tuple[str, Tensor]], version: int, servers: Sequence[StudentServer]
    ) -> Weights:
        """Have all servers serve them. `named_tensors` is exhausted, come what may: other ranks help to make them.

        UserError for tensors that are not the expected ones, and if a server can't take them, or is gone.
        """
        weights = Weights(version, f"{self.run}-{version}")
        named_tensors = iter(named_tensors)
        try:
            with ExitStack() as locks:
                for server in servers:
                    locks.enter_context(server.lock)
                    server.wanted = weights
                self._kept = []
                new = self._keeping(named_tensors)
                try:
                    self._send(new, servers)
                    for server, label in zip(servers, each(StudentServer.serve_wanted, servers), strict=True):
                        server.label = label
                except ServerDown:
                    for _ in new:
                        pass
            each(StudentServer.current_label, servers)  # and whoever has not got them yet gets what was kept
        finally:
            for _ in named_tensors:
                pass
        return weights

    def hand_over(self, server: StudentServer) -> None:
        """`StudentServer`'s, on this rank."""
        try:
            self._send(self._kept, [server])
        except ServerDown as error:
            if not server.is_up():
                raise
            raise UserError(
                f"{server.url}: can't be sent the student's weights over {self.backend} and needs a restart. Do both "
                f"sides reach each other, and does it serve the student's architecture? It says: {error}"
            ) from error

    def close(self) -> None:
        with self._lock:
            self._leave()

    def _keeping(self, named_tensors: Iterator[tuple[str, Tensor]]) -> Iterator[Buffer]:
        shapes: Shapes = {}
        for buffer in buffers(named_tensors):
            found = {name: tuple(shape) for name, shape in zip(buffer.names, buffer.shapes, strict=True)}
            check_shapes(found, {name: self.expected[name] for name in found if name in self.expected})
            shapes |= found
            self._kept.append(replace(buffer, data=buffer.data.cpu()))
            yield buffer
        check_shapes(shapes, self.expected, self.optional)

    def _send(self, new: Iterable[Buffer], servers: Sequence[StudentServer]) -> None:
        with self._lock:
            try:
                intact = all(each(_prepare, servers))
                if not intact or self._group is None or list(self._members) != list(servers):
                    self._leave()
                    self._meet(servers)
                each(_start, servers)
                for buffer in new:
                    body = {"update_info": buffer.update_info()}
                    self._together(
                        partial(self._group.broadcast, buffer.data), "/update_weights", [body] * len(servers)
                    )
                each(_finish, servers)
            except BaseException:
                self._leave()
                raise

    def _meet(self, servers: Sequence[StudentServer]) -> None:
        """Open a group with all workers of `servers`."""
        sizes = each(lambda server: server.exchange("GET", "/get_world_size")["world_size"], servers)
        size = 1 + sum(sizes)
        if self.backend == "gloo":
            try:
                group: TransferGroup = GlooGroup(size, [server.url for server in servers], self.timeout)
            except OSError as error:
                raise ServerDown(
                    f"there is no way to {', '.join(server.url for server in servers)}: {error}"
                ) from error
        else:
            group = NcclGroup(size)
        each(lambda server: server.exchange("POST", "/shutdown_weight_transfer_engine"), servers)
        self._group, self._members = group, servers
        offsets = accumulate(sizes[:-1], initial=1)
        bodies = [{"init_info": group.invitation(offset)} for offset in offsets]
        self._together(group.join, "/init_weight_transfer_engine", bodies)

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group, self._members = None, ()

    def _together(self, own: Callable[[], None], path: str, bodies: Sequence[dict[str, Any]]) -> None:
        """What this rank does while each server does its part. ServerDown as soon as one of them fails."""

        def ours() -> None:
            try:
                own()
            except RuntimeError as error:  # torch's, of every kind of broken connection
                where = ", ".join(server.url for server in self._members)
                raise ServerDown(f"{where}: {path} broke off: {error}") from error

        calls = [partial(s.exchange, "POST", path, json=body) for s, body in zip(self._members, bodies, strict=True)]
        try:
            together([in_background(part) for part in (*calls, ours)], self.timeout)
        except TimeoutError as error:
            where = ", ".join(server.url for server in self._members)
            raise ServerDown(f"{where}: {path}: {error} (rollout.server_timeout_s)") from error


def _prepare(server: StudentServer) -> bool:
    """Pause it, and clear away an update that broke off. Whether it still is as this run has left it."""
    server.pause()
    label = server.reported_label()
    if label == _UNFINISHED:  # what has arrived would count as part of the next update
        try:
            _start(server)
        except ServerDown:
            pass  # it still waits for the rest
        _finish(server)
    return label == server.label


def _start(server: StudentServer) -> None:
    server.set_label(_UNFINISHED)
    server.exchange("POST", "/start_weight_update")


def _finish(server: StudentServer) -> None:
    server.exchange("POST", "/finish_weight_update")


def wait_for_first_rank(server: StudentServer) -> None:
    """`StudentServer`'s `hand_over` on the other ranks."""
    raise ServerDown(f"{server.url}: has not got the student's weights of version {server.wanted.version} again yet")


class Keeper:
    """Looks every second whether servers still have their weights, so that other ranks' answers don't wait for ever.

    On the first rank, which alone can send them, and which may have nothing to ask of a server itself.
    """

    def __init__(self, servers: Sequence[StudentServer]):
        self._stop = threading.Event()
        for server in servers:
            in_background(partial(self._look_after, server))

    def _look_after(self, server: StudentServer) -> None:
        while not self._stop.wait(1.0):
            server.look_after()

    def close(self) -> None:
        self._stop.set()
