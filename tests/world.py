"""Persistent gloo worlds: run a function in every rank of a process group, without paying for it in each test.

    results = gloo_world(4).run(check, beta=0.5)      # check(rank, world_size, beta=0.5) -> one result a rank

The ranks are forked from a server that has already imported the heavy modules, join their process group once, and then
serve one call after another. Every call starts from ``torch.manual_seed(0)``; anything else that a function leaves
behind (Megatron's parallel state, process groups) it has to take down itself. A call that fails takes its world down,
and the next call starts a new one.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib.util
import multiprocessing
import multiprocessing.queues
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

# Before torch is imported anywhere: the ranks share few cores, and the loopback device always resolves.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if sys.platform == "linux":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

REPOSITORY = Path(__file__).resolve().parents[1]
# A missing one is passed over.
PRELOAD = ["torch", "torch.distributed", "pytest", "hypothesis", "megatron_gkd.runtime.preload", "vllm.entrypoints.llm"]
PRELOAD += ["megatron_gkd.training.run", "megatron_gkd.training.score", "matplotlib.pyplot"]
PRELOAD += ["megatron.core.dist_checkpointing.strategies.torch"]
DEFAULT_TIMEOUT = 300.0
MOST_THREADS = 150
STACK_DUMP_SECONDS = 0.5


class RemoteTraceback(Exception):
    """The cause of an exception raised by ``World.run``: where it happened, in which rank."""

    def __init__(self, rank: int, text: str):
        super().__init__(rank, text)
        self.rank, self.text = rank, text

    def __str__(self) -> str:
        return f"in rank {self.rank}:\n{self.text}"


class World:
    """`size` processes that share one gloo process group, started by the first call of ``run``."""

    def __init__(self, size: int):
        self.size = size
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._connections: list[Connection] = []
        self._folder: Path | None = None

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = DEFAULT_TIMEOUT, **kwargs: Any) -> list[Any]:
        """Call ``fn(rank, world_size, *args, **kwargs)`` in every rank; return the results in rank order.

        `fn` is a module-level function of any file, a test module too; arguments and results are pickled, result
        tensors come back detached and on the CPU. The first exception of any rank is raised here, with that rank's
        traceback as its cause. TimeoutError, with the stacks of the ranks still busy, after `timeout` seconds.
        """
        call = pickle.dumps((fn.__code__.co_filename, fn.__module__, fn.__qualname__, pickle.dumps((args, kwargs))))
        if self._is_crowded():
            self.kill()
        if not self._processes:
            self._start()
        try:
            for connection in self._connections:
                connection.send_bytes(call)
            return self._collect(time.monotonic() + timeout)
        except BaseException:  # other ranks may hang in a collective, and KeyboardInterrupt counts
            self.kill()
            raise

    def _is_crowded(self) -> bool:
        """Return whether the ranks hold so many threads that these slow each other down.

        gloo keeps two polling threads for every process group that ever was, destroyed or not.
        """
        tasks = [Path(f"/proc/{process.pid}/task") for process in self._processes]
        return any(task.exists() and len(os.listdir(task)) > MOST_THREADS for task in tasks)

    def close(self) -> None:
        """Let the ranks leave in order; kill those that don't."""
        for connection in self._connections:
            connection.close()  # the ranks read end-of-file
        for process in self._processes:
            process.join(timeout=5)
        self.kill()

    def kill(self) -> None:
        """End all ranks at once. The next ``run`` starts new ones."""
        for process in self._processes:
            process.kill()
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.join()
            connection.close()
        self._processes, self._connections = [], []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def send_signal(self, number: int) -> None:
        """Send a signal to every rank.

        Another thread may do it while a call is under way: if the ranks die of it, that call fails.
        """
        for process in list(self._processes):
            os.kill(process.pid, number)

    def _start(self) -> None:
        context = forkserver()
        self._folder = Path(tempfile.mkdtemp(prefix="gloo_world_"))
        for rank in range(self.size):
            connection, remote = context.Pipe()
            process = context.Process(target=_serve, args=(remote, rank, self.size, self._folder), daemon=True)
            process.start()
            remote.close()
            self._processes.append(process)
            self._connections.append(connection)

    def _collect(self, deadline: float) -> list[Any]:
        results: dict[int, Any] = {}
        while len(results) < self.size:
            pending = {self._connections[rank]: rank for rank in range(self.size) if rank not in results}
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"ranks {sorted(pending.values())} did not return in time\n{self._stacks(pending)}")
            for connection in ready:
                rank = pending[connection]
                try:
                    succeeded, payload = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join()
                    exitcode = self._processes[rank].exitcode
                    stacks = _stack_file(self._folder, rank).read_text()
                    raise RuntimeError(f"rank {rank} died with exit code {exitcode}\n{stacks}") from None
                if not succeeded:
                    exception, text = payload
                    raise exception from RemoteTraceback(rank, text)
                results[rank] = payload
        return [results[rank] for rank in range(self.size)]

    def _stacks(self, pending: dict[Connection, int]) -> str:
        for rank in pending.values():
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(STACK_DUMP_SECONDS)
        return "\n".join(f"rank {rank}:\n{_stack_file(self._folder, rank).read_text()}" for rank in pending.values())


def forkserver() -> multiprocessing.context.BaseContext:
    """Return a context whose children are forked from a process that has imported PRELOAD once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)  # no effect once the server runs
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(REPOSITORY) not in paths:  # the server preloads before it learns our sys.path
        os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, paths)])
    return context


def start_process(fn: Callable[..., Any], *args: Any) -> multiprocessing.process.BaseProcess:
    """Start a process that calls ``fn(*args)``, and return it.

    A fork of pytest's own process may hang: locks that its other threads hold at that moment stay locked in the child.

    Args:
        fn: a module-level function of any file, a test module too.
        args: of importable classes, and ``process_queue()``.
    """
    target = (fn.__code__.co_filename, fn.__module__, fn.__qualname__)
    process = forkserver().Process(target=_call, args=(*target, *args))
    process.start()
    return process


def process_queue() -> multiprocessing.queues.Queue:
    """Return a queue that ``start_process`` takes among its arguments."""
    return forkserver().Queue()


def _call(path: str, module_name: str, qualname: str, *args: Any) -> None:
    gc.freeze()
    _find(path, module_name, qualname)(*args)


def _serve(connection: Connection, rank: int, size: int, folder: Path) -> None:
    """Run one rank: join the process group, then serve calls until the connection closes."""
    import torch
    import torch.distributed as dist

    gc.freeze()  # a collection would copy all pages of what was imported before the fork
    stacks = open(_stack_file(folder, rank), "w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=False)
    faulthandler.enable(file=stacks)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size, timeout=timedelta(minutes=10))
    while True:
        try:
            call = connection.recv_bytes()
        except EOFError:
            break
        connection.send_bytes(_serve_call(call, rank, size))
    dist.destroy_process_group()


def _serve_call(call: bytes, rank: int, size: int) -> bytes:
    import torch
    from torch.utils._pytree import tree_map_only

    try:
        path, module_name, qualname, arguments = pickle.loads(call)
        fn = _find(path, module_name, qualname)
        args, kwargs = pickle.loads(arguments)  # only now: they may be of classes that the test module defines
        torch.manual_seed(0)
        result = fn(rank, size, *args, **kwargs)
        return pickle.dumps((True, tree_map_only(torch.Tensor, lambda tensor: tensor.detach().cpu(), result)))
    except BaseException as error:
        text = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # not every exception can be pickled
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return pickle.dumps((False, (error, text)))


def _find(path: str, module_name: str, qualname: str) -> Callable[..., Any]:
    found: Any = _load(path, module_name)
    for name in qualname.split("."):
        found = getattr(found, name)
    return found


def _load(path: str, name: str) -> ModuleType:
    """Import the file under the name that pytest gave it, so that its classes pickle both ways."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"stack.{rank}"
