"""The student's weights to vLLM servers through vLLM's weight-transfer protocol: over nccl or gloo, without files.

The world's first rank gathers them into buffers of bytes. A server is told over HTTP what is in the next buffer, which
is broadcast to its workers; all servers are sent to at the same time, each in a group of its own, so that one that dies
in the middle holds up nobody else. The same buffers stay in host memory until the next version: a server that has been
restarted gets them from there. Exporting again would take all ranks, which may be in the middle of a training step, or
waiting for the very answers that the server owes.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
import torch
from torch import Tensor

from megatron_gkd.errors import UserError
from megatron_gkd.rollout.vllm.client import StudentServer, Weights
from megatron_gkd.rollout.vllm.transfer_groups import GlooGroup, NcclGroup, TransferGroup
from megatron_gkd.rollout.vllm.weight_folder import Shapes, check_shapes
from megatron_gkd.runtime.background import in_background, parallel_map, wait_all
from megatron_gkd.runtime.servers import ServerDown

Backend = Literal["nccl", "gloo"]

_BUFFER_BYTES = 2**30
_UNFINISHED = "unfinished"  # a server's label from the first new tensor to the last


class _WorldSize(msgspec.Struct):
    world_size: Annotated[int, msgspec.Meta(ge=1)]


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


class Link:
    """To the workers of one server. `timeout`: seconds that one exchange with them may take."""

    def __init__(self, server: StudentServer, backend: Backend, timeout: float):
        self.server, self.backend, self.timeout = server, backend, timeout
        self._group: TransferGroup | None = None

    def begin(self) -> None:
        """Pause the server, meet its workers, and make them ready for weights. Like the next two, raises ServerDown."""
        self.server.pause()
        label = self.server.reported_label()
        if label == _UNFINISHED:  # what has arrived of that update would count as part of the next
            with contextlib.suppress(ServerDown):  # it waits for the rest, and has not to be started
                self._post("/start_weight_update")
            self._post("/finish_weight_update")
        if self._group is None or label != self.server.label:  # not as this run has left it
            self._meet()
        self.server.set_label(_UNFINISHED)
        self._post("/start_weight_update")

    def send(self, buffer: Buffer) -> None:
        group = self._group
        self._together(lambda: group.broadcast(buffer.data), "/update_weights", {"update_info": buffer.update_info()})

    def finish(self) -> None:
        self._post("/finish_weight_update")

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = None

    def _meet(self) -> None:
        self.close()
        size = 1 + self.server.request("GET", "/get_world_size", _WorldSize).world_size
        if self.backend == "gloo":
            try:
                group: TransferGroup = GlooGroup(size, self.server.url, self.timeout)
            except OSError as error:
                raise ServerDown(f"{self.server.url}: there is no way to it: {error}") from error
        else:
            group = NcclGroup(size)
        self._post("/shutdown_weight_transfer_engine")
        self._together(group.join, "/init_weight_transfer_engine", {"init_info": group.invitation()})
        self._group = group

    def _post(self, path: str) -> None:
        self.server.command(path)

    def _together(self, own: Callable[[], None], path: str, body: dict[str, Any]) -> None:
        """What this rank does while the server does its part. ServerDown as soon as one of them fails."""
        theirs = in_background(lambda: self.server.command(path, json=body))
        try:
            wait_all([theirs, in_background(own)], self.timeout)
        except TimeoutError as error:
            raise ServerDown(f"{self.server.url}{path}: {error} (rollout.vllm_server_timeout_s)") from error
        except RuntimeError as error:  # torch's, of every kind of broken connection
            raise ServerDown(f"{self.server.url}{path}: broke off: {error}") from error


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
        self._links: dict[str, Link] = {}  # by the server's URL; each is used under its server's lock

    def load(
        self, named_tensors: Iterable[tuple[str, Tensor]], version: int, servers: Sequence[StudentServer]
    ) -> Weights:
        """Have all servers serve them. `named_tensors` is exhausted, come what may: other ranks help to make them.

        UserError for tensors that are not the expected ones, and if a server can't take them, or is gone.
        """
        weights = Weights(version, f"{self.run}-{version}")
        named_tensors = iter(named_tensors)
        try:
            with contextlib.ExitStack() as locks:
                for server in servers:
                    locks.enter_context(server.lock)
                    server.wanted = weights
                self._kept = []
                links = _survivors(Link.begin, [self._link(server) for server in servers])
                for buffer in self._keeping(named_tensors):
                    links = _survivors(lambda link, buffer=buffer: link.send(buffer), links)
                _survivors(_finish, links)
            parallel_map(StudentServer.current_label, servers)  # who has not got them yet gets what was kept
        finally:
            for _ in named_tensors:
                pass
        return weights

    def hand_over(self, server: StudentServer) -> None:
        """`StudentServer`'s, on this rank."""
        link = self._link(server)
        try:
            link.begin()
            for buffer in self._kept:
                link.send(buffer)
            link.finish()
        except ServerDown as error:
            link.close()
            if not server.is_up():
                raise
            raise UserError(
                f"{server.url}: can't be sent the student's weights over {self.backend} and needs a restart. Do both "
                f"sides reach each other, and does it serve the student's architecture? It says: {error}"
            ) from error

    def close(self) -> None:
        for link in self._links.values():
            link.close()

    def _link(self, server: StudentServer) -> Link:
        return self._links.setdefault(server.url, Link(server, self.backend, self.timeout))

    def _keeping(self, named_tensors: Iterator[tuple[str, Tensor]]) -> Iterator[Buffer]:
        shapes: Shapes = {}
        for buffer in buffers(named_tensors):
            found = {name: tuple(shape) for name, shape in zip(buffer.names, buffer.shapes, strict=True)}
            check_shapes(found, {name: self.expected[name] for name in found if name in self.expected})
            shapes |= found
            self._kept.append(replace(buffer, data=buffer.data.cpu()))
            yield buffer
        check_shapes(shapes, self.expected, self.optional)


def _survivors(work: Callable[[Link], None], links: Sequence[Link]) -> list[Link]:
    """Those for which it works. The others are closed."""

    def attempt(link: Link) -> bool:
        try:
            work(link)
        except ServerDown:
            link.close()
            return False
        return True

    return [link for link, works in zip(links, parallel_map(attempt, links), strict=True) if works]


def _finish(link: Link) -> None:
    link.finish()
    link.server.label = link.server.serve_wanted()


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
