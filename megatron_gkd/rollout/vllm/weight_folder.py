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

from megatron_gkd.errors import UserError
from megatron_gkd.rollout.vllm.client import StudentServer, Weights
from megatron_gkd.runtime.background import parallel_map
from megatron_gkd.runtime.disk import publish
from megatron_gkd.runtime.servers import ServerDown

Shapes = dict[str, tuple[int, ...]]

VERSION_PREFIX = "weights-"  # of the folders' names
_MOST_BYTES = 5 * 10**9  # of a file, which is in host memory before it is written


@dataclass(frozen=True)
class SharedWeights(Weights):
    """One version of the student's weights on disk.

    Attributes:
        directory: absolute, with safetensors files, and what says how to read them; its name was never used before.
        shapes: of the tensors in `directory`, by their Hugging Face names.
    """

    directory: Path
    shapes: Shapes

    def validate(self) -> None:
        """UserError unless `directory` holds exactly these tensors: a server that reads anything else is lost."""
        found = tensor_shapes(self.directory)
        if found != self.shapes:
            raise UserError(f"{self.directory}: not what was written there: {_differences(found, self.shapes)}")


class WeightFolder:
    """Writes one version after another into `root`.

    Args:
        root: made if missing. Folders in it whose name begins with "weights-" belong to this class.
        expected: names and shapes that every version has to have.
        optional: names in `expected` that may be missing, for being copies of others.
    """

    def __init__(self, root: Path, expected: Shapes, optional: Iterable[str] = ()):
        self.root, self.expected, self.optional = root.absolute(), expected, frozenset(optional)
        self.run = secrets.token_hex(4)

    def write(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> SharedWeights:
        """Exhausts `named_tensors`, come what may: other ranks take part in making them.

        Raises UserError for tensors that are not the expected ones, and if they can't be written.
        """
        label = f"{self.run}-{version}"
        # A name of its own in every run: a network file system may still remember what an old one held.
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
        """Write them and have all servers load them. `named_tensors` is exhausted, come what may."""
        weights = self.write(named_tensors, version)
        parallel_map(lambda server: server.load(weights), servers)
        self.forget_all_but(weights)
        return weights

    def forget_all_but(self, weights: SharedWeights) -> None:
        """Delete all other versions, and what interrupted runs have left."""
        for path in self.root.glob(f"{VERSION_PREFIX}*"):
            if path != weights.directory:
                shutil.rmtree(path, ignore_errors=True)


def hand_over(server: StudentServer) -> None:
    """The `hand_over` of servers that see the folder: any rank may do it."""
    weights: SharedWeights = server.wanted
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
    """Raise UserError with `problem` and the server's words where a server that is up refuses new weights."""
    try:
        yield
    except ServerDown as error:
        if not server.is_up():  # it went down, for this reason or another; its successor gets its chance
            raise
        raise UserError(f"{server.url}: {problem} It says: {error}") from error


def check_shapes(shapes: Shapes, expected: Shapes, optional: Collection[str] = ()) -> None:
    """UserError unless these are the expected tensors, and all of them but for `optional` ones."""
    expected = {name: shape for name, shape in expected.items() if name in shapes or name not in optional}
    if shapes != expected:
        raise UserError(
            f"the student's weights are not those of the checkpoint it began as: {_differences(shapes, expected)}"
        )


def tensor_shapes(directory: Path) -> Shapes:
    """Of all tensors in a folder of safetensors files. UserError if there are none, or one can't be read."""
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
    """The tensors on the CPU, as many at a time as a file may hold."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in named_tensors:
        if shard and size + tensor.nbytes > _MOST_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    if shard:
        yield shard


def _differences(found: Shapes, expected: Shapes, most: int = 3) -> str:
    names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    told = [f"{name} is {found.get(name, 'missing')} and should be {expected.get(name, 'absent')}" for name in names]
    return "; ".join(told[:most]) + (f"; and {len(told) - most} more" if len(told) > most else "")
