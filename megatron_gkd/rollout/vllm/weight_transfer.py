"""Send the student's weights to vLLM servers through vLLM's weight-transfer protocol: over nccl or gloo, without files.

The world's main rank gathers the weights into buffers of bytes. It sends a server the names and shapes of the next
buffer over HTTP, and broadcasts the buffer to the server's workers. All servers receive at the same time, each in a
group of its own, so that a server that fails does not delay the others. The buffers stay in host memory until the next
version: a restarted server gets them from there. To export again would take all ranks, which may be in the middle of a
training step, or waiting for the completions of that server.
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

from megatron_gkd.errors import ServiceError
from megatron_gkd.rollout.vllm.client import StudentServer, Weights
from megatron_gkd.rollout.vllm.transfer_groups import GlooGroup, NcclGroup, TransferGroup
from megatron_gkd.rollout.vllm.weight_folder import Shapes, check_shapes, explain_refusal
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
        """Return the body of /update_weights."""
        name = str(self.dtype).removeprefix("torch.")
        return {"names": self.names, "dtype_names": [name] * len(self.names), "shapes": self.shapes}


def pack_buffers(named_tensors: Iterable[tuple[str, Tensor]], max_bytes: int = _BUFFER_BYTES) -> Iterator[Buffer]:
    """Yield the tensors in order, as many a buffer as `max_bytes` hold, and at least one."""
    part: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in named_tensors:
        if part and (size + tensor.nbytes > max_bytes or tensor.dtype != part[0][1].dtype):
            yield _pack(part)
            part, size = [], 0
        part.append((name, tensor.detach()))
        size += tensor.nbytes
    if part:
        yield _pack(part)


def _pack(part: list[tuple[str, Tensor]]) -> Buffer:
    names, tensors = zip(*part, strict=True)
    data = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])
    return Buffer(list(names), [list(tensor.shape) for tensor in tensors], tensors[0].dtype, data)


class Link:
    """A connection to the workers of one server. Its methods raise ServerDown if the server fails.

    Args:
        server: of the workers.
        backend: that the server was started with.
        timeout: seconds that one exchange with the workers may take.
    """

    def __init__(self, server: StudentServer, backend: Backend, timeout: float) -> None:
        self.server, self.backend, self.timeout = server, backend, timeout
        self._group: TransferGroup | None = None

    def begin(self) -> None:
        """Pause the server, connect to its workers, and make them ready for weights."""
        self.server.pause()
        label = self.server.reported_label()
        if label == _UNFINISHED:  # what has arrived of that update would count as part of the next
            with contextlib.suppress(ServerDown):  # it may still wait for the other tensors
                self._post("/start_weight_update")
            self._post("/finish_weight_update")
        if self._group is None or label != self.server.label:  # not as this run has left it
            self._connect()
        self.server.set_label(_UNFINISHED)
        self._post("/start_weight_update")

    def send(self, buffer: Buffer) -> None:
        """Send one buffer."""
        group = self._group
        if group is None:
            raise RuntimeError(f"{self.server.url}: begin must be called before send")
        body = {"update_info": buffer.update_info()}
        self._run_with_server(lambda: group.broadcast(buffer.data), "/update_weights", body)

    def finish(self) -> None:
        """Make the workers ready to sample from the new weights."""
        self._post("/finish_weight_update")

    def close(self) -> None:
        """Close the connection."""
        if self._group is not None:
            self._group.close()
        self._group = None

    def _connect(self) -> None:
        self.close()
        size = 1 + self.server.request("GET", "/get_world_size", _WorldSize).world_size
        if self.backend == "gloo":
            try:
                group: TransferGroup = GlooGroup(size, self.server.url, self.timeout)
            except OSError as error:
                raise ServerDown(f"{self.server.url}: there is no route to it: {error}") from error
        else:
            group = NcclGroup(size)
        self._post("/shutdown_weight_transfer_engine")
        self._run_with_server(group.join, "/init_weight_transfer_engine", {"init_info": group.init_info()})
        self._group = group

    def _post(self, path: str) -> None:
        self.server.command(path)

    def _run_with_server(self, own: Callable[[], None], path: str, body: dict[str, Any]) -> None:
        """Run this rank's part of an exchange while the server runs its own; stop as soon as one of them fails."""
        server_part = in_background(lambda: self.server.command(path, json=body))
        try:
            wait_all([server_part, in_background(own)], self.timeout)
        except TimeoutError as error:
            raise ServerDown(f"{self.server.url}{path}: {error} (rollout.vllm_server_timeout_s)") from error
        except RuntimeError as error:  # torch's, of every kind of broken connection
            raise ServerDown(f"{self.server.url}{path}: the connection broke: {error}") from error


class WeightTransfer:
    """Send weights from the world's main rank.

    Args:
        backend: that the servers were started with.
        expected: names and shapes that every version has to have.
        optional: names in `expected` that may be missing, because they are copies of others.
        timeout: seconds that one buffer may take.
    """

    def __init__(self, backend: Backend, expected: Shapes, optional: Collection[str], timeout: float) -> None:
        self.backend, self.expected, self.optional, self.timeout = backend, expected, optional, timeout
        self.run = secrets.token_hex(4)
        self._kept: list[Buffer] = []
        self._links: dict[str, Link] = {}  # by the server's URL; each is used under its server's lock

    def load(
        self, named_tensors: Iterable[tuple[str, Tensor]], version: int, servers: Sequence[StudentServer]
    ) -> Weights:
        """Let all servers load a version. `named_tensors` is exhausted even after an error, as other ranks make them.

        Raises:
            UserError: the tensors are not the expected ones.
            ServiceError: a server can't load them, or is gone.
        """
        weights = Weights(version, f"{self.run}-{version}")
        named_tensors = iter(named_tensors)
        try:
            with contextlib.ExitStack() as locks:
                for server in servers:
                    locks.enter_context(server.lock)
                    server.wanted = weights
                self._kept = []
                links = _filter_working(Link.begin, [self._link(server) for server in servers])
                for buffer in self._keep(named_tensors):
                    links = _filter_working(partial(_send, buffer), links)
                _filter_working(_finish, links)
            parallel_map(StudentServer.ensure_current, servers)  # servers that failed load what was kept
        finally:
            for _ in named_tensors:
                pass
        return weights

    def send_to(self, server: StudentServer) -> None:
        """Send the kept weights to a server; this is `StudentServer`'s `send_weights` on the main rank."""
        link = self._link(server)
        problem = (
            f"can't be sent the student's weights over {self.backend} and needs a restart. Do both "
            "sides reach each other, and does it serve the student's architecture?"
        )
        try:
            with explain_refusal(server, problem):
                link.begin()
                for buffer in self._kept:
                    link.send(buffer)
                link.finish()
        except (ServerDown, ServiceError):
            link.close()
            raise

    def close(self) -> None:
        """Close all connections."""
        for link in self._links.values():
            link.close()

    def _link(self, server: StudentServer) -> Link:
        return self._links.setdefault(server.url, Link(server, self.backend, self.timeout))

    def _keep(self, named_tensors: Iterator[tuple[str, Tensor]]) -> Iterator[Buffer]:
        """Yield the buffers of `named_tensors`, and keep copies in host memory."""
        shapes: Shapes = {}
        for buffer in pack_buffers(named_tensors):
            packed = {name: tuple(shape) for name, shape in zip(buffer.names, buffer.shapes, strict=True)}
            check_shapes(packed, {name: self.expected[name] for name in packed if name in self.expected})
            shapes |= packed
            self._kept.append(replace(buffer, data=buffer.data.cpu()))
            yield buffer
        check_shapes(shapes, self.expected, self.optional)


def _filter_working(work: Callable[[Link], None], links: Sequence[Link]) -> list[Link]:
    """Call `work` on all links and return those for which it succeeds; close the others."""

    def attempt(link: Link) -> bool:
        try:
            work(link)
        except ServerDown:
            link.close()
            return False
        return True

    return [link for link, works in zip(links, parallel_map(attempt, links), strict=True) if works]


def _send(buffer: Buffer, link: Link) -> None:
    link.send(buffer)


def _finish(link: Link) -> None:
    link.finish()
    link.server.label = link.server.resume()


def wait_for_main_rank(server: StudentServer) -> None:
    """Raise ServerDown until the main rank has sent the weights; `StudentServer`'s `send_weights` on other ranks."""
    raise ServerDown(
        f"{server.url}: does not have the student's weights of version {server.wanted_weights.version} again yet"
    )


class HealthMonitor:
    """Check every second whether servers still have their weights, so that other ranks do not wait without end.

    It runs on the main rank, which alone can send weights, and which may have no requests to a server itself.
    """

    def __init__(self, servers: Sequence[StudentServer]) -> None:
        self._stop = threading.Event()
        for server in servers:
            in_background(partial(self._monitor, server))

    def _monitor(self, server: StudentServer) -> None:
        while not self._stop.wait(1.0):
            server.try_to_restore()

    def close(self) -> None:
        """Stop checking."""
        self._stop.set()
