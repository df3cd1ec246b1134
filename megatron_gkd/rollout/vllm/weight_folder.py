"""The student's weights as checkpoints in a folder that the trainer and the inference servers both see."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_gkd.errors import ServiceError, UserError
from megatron_gkd.rollout.vllm.client import StudentServer, Weights
from megatron_gkd.runtime.background import parallel_map
from megatron_gkd.runtime.disk import publish
from megatron_gkd.runtime.servers import ServerDown

Shapes = dict[str, tuple[int, ...]]

VERSION_PREFIX = "weights-"  # of the folders' names
_MAX_FILE_BYTES = 5 * 10**9  # a file is in host memory before it is written


@dataclass(frozen=True)
class SharedWeights(Weights):
    """One version of the student's weights on disk.

    Attributes:
        directory: absolute, with safetensors files and their configuration; its name was never used before.
        shapes: of the tensors in `directory`, by their Hugging Face names.
    """

    directory: Path
    shapes: Shapes

    def validate(self) -> None:
        """Check that `directory` holds exactly these tensors: a server that reads anything else needs a restart.

        Raises:
            UserError: it does not.
        """
        shapes = tensor_shapes(self.directory)
        if shapes != self.shapes:
            raise UserError(f"{self.directory}: not what was written there: {_differences(shapes, self.shapes)}")


class WeightFolder:
    """Write one version after another into `root`.

    Args:
        root: made if missing. Folders in it whose name begins with "weights-" belong to this class.
        expected: names and shapes that every version has to have.
        optional: names in `expected` that may be missing, because they are copies of others.
    """

    def __init__(self, root: Path, expected: Shapes, optional: Iterable[str] = ()) -> None:
        self.root, self.expected, self.optional = root.absolute(), expected, frozenset(optional)
        self.run = secrets.token_hex(4)

    def write(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> SharedWeights:
        """Write a version. `named_tensors` is exhausted even after an error: other ranks take part in making them.

        Raises:
            UserError: the tensors are not the expected ones, or can't be written.
        """
        label = f"{self.run}-{version}"
        # A name of its own in every run: a network file system may still cache the content of an old one.
        directory = self.root / f"{VERSION_PREFIX}{version:06d}-{self.run}"
        unfinished = directory.with_name(directory.name + ".unfinished")
        named_tensors = iter(named_tensors)
        try:
            unfinished.mkdir(parents=True)
            shapes = self._save(named_tensors, unfinished)
            check_shapes(shapes, self.expected, self.optional)
            publish(unfinished, directory)
        except (OSError, SafetensorError) as error:
            raise UserError(f"the weights for the rollout servers can't be written to {directory}: {error}") from error
        finally:
            for _ in named_tensors:
                pass
        weights = SharedWeights(version, label, directory, shapes)
        weights.validate()
        return weights

    def _save(self, named_tensors: Iterable[tuple[str, Tensor]], directory: Path) -> Shapes:
        shapes: Shapes = {}
        for number, shard in enumerate(_shards(named_tensors), start=1):
            save_file(shard, directory / f"model-{number:05d}.safetensors")
            shapes |= {name: tuple(tensor.shape) for name, tensor in shard.items()}
        return shapes

    def load(
        self, named_tensors: Iterable[tuple[str, Tensor]], version: int, servers: Sequence[StudentServer]
    ) -> SharedWeights:
        """Write a version and let all servers load it. `named_tensors` is exhausted even after an error."""
        weights = self.write(named_tensors, version)
        parallel_map(lambda server: server.load(weights), servers)
        self.remove_all_but(weights)
        return weights

    def remove_all_but(self, weights: SharedWeights) -> None:
        """Delete all other versions, and what interrupted runs have left."""
        for path in self.root.glob(f"{VERSION_PREFIX}*"):
            if path != weights.directory:
                shutil.rmtree(path, ignore_errors=True)


def shared_weights_of(server: StudentServer) -> SharedWeights:
    """Return the wanted weights of a server that loads them from a folder."""
    weights = server.wanted_weights
    if not isinstance(weights, SharedWeights):
        raise TypeError(f"{server.url}: its weights are no SharedWeights: {weights}")
    return weights


def load_from_folder(server: StudentServer) -> None:
    """Let a server that sees the folder load its wanted weights: any rank may do it."""
    weights = shared_weights_of(server)
    weights.validate()
    server.pause()
    call = {"method": "reload_weights", "kwargs": {"weights_path": str(weights.directory)}}
    problem = (
        f"can't load {weights.directory} and needs a restart. Does it see this folder under this path "
        "(rollout.weight_sync_dir), and does it serve the student's architecture?"
    )
    with explain_refusal(server, problem):
        server.command("/collective_rpc", json=call)


@contextlib.contextmanager
def explain_refusal(server: StudentServer, problem: str) -> Iterator[None]:
    """Raise ServiceError with `problem` and the server's message if a server that is up refuses new weights."""
    try:
        yield
    except ServerDown as error:
        if not server.is_up():  # it went down, for this reason or another; it may be restarted
            raise
        raise ServiceError(f"{server.url}: {problem} Its message: {error}") from error


def check_shapes(shapes: Shapes, expected: Shapes, optional: Collection[str] = ()) -> None:
    """Check that these are the expected tensors, and all of them but for `optional` ones.

    Raises:
        UserError: they are not.
    """
    expected = {name: shape for name, shape in expected.items() if name in shapes or name not in optional}
    if shapes != expected:
        raise UserError(
            f"the student's weights are not those of the checkpoint it began as: {_differences(shapes, expected)}"
        )


def tensor_shapes(directory: Path) -> Shapes:
    """Return the shapes of all tensors in a folder of safetensors files.

    Raises:
        UserError: there are no files, or one can't be read.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"{directory}: no *.safetensors file there")
    shapes: Shapes = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: can't be read ({error})") from error
    return shapes


def _shards(named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors on the CPU, as many at a time as a file may hold."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in named_tensors:
        if shard and size + tensor.nbytes > _MAX_FILE_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    if shard:
        yield shard


def _differences(shapes: Shapes, expected: Shapes, most: int = 3) -> str:
    names = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
    texts = [f"{name} is {shapes.get(name, 'missing')} and should be {expected.get(name, 'absent')}" for name in names]
    return "; ".join(texts[:most]) + (f"; and {len(texts) - most} more" if len(texts) > most else "")
