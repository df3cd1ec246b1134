"""Models by name: directories, and ids of a hub, whose files its own library downloads and keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_gkd.config.schema import OneTeacher, StudentSection
from megatron_gkd.errors import UserError

WANTED_BESIDE_WEIGHTS = ["*.json", "*.txt", "*.model", "*.jinja"]
WANTED = ["*.safetensors", *WANTED_BESIDE_WEIGHTS]
"""Patterns of the files that are downloaded."""

_CONFIGURATION = "config.json"


@dataclass(frozen=True)
class ModelSource:
    """A model as a recipe names it.

    Attributes:
        name: a directory or an id of a hub.
        revision: branch, tag or commit on the hub; None for the newest. Of a directory it has no meaning.
        use_hf: whether ids are those of Hugging Face's hub, or of ModelScope.
    """

    name: str
    revision: str | None = None
    use_hf: bool = True

    @classmethod
    def of_student(cls, section: StudentSection) -> ModelSource:
        """Return the recipe's student."""
        return cls(section.model, section.model_revision, section.use_hf)

    @classmethod
    def of_teacher(cls, teacher: OneTeacher, name: str, student: StudentSection) -> ModelSource:
        """Return the recipe's teacher `name`, which is of the student's hub."""
        return cls(name, teacher.teacher_model_revision, student.use_hf)

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory here."""
        return Path(self.name).is_dir()

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def download(
    source: ModelSource, revision: str | None, *, local_files_only: bool = False, patterns: Sequence[str] = WANTED
) -> Path:
    """Return the directory of a hub's model, whose missing files are downloaded.

    Args:
        source: an id of a hub.
        revision: branch, tag or commit; None for the newest.
        local_files_only: whether the hub is not asked.
        patterns: of the files.

    Raises:
        UserError: it can't be downloaded, or the hub's library is not installed.
    """
    try:
        if source.use_hf:
            return _from_hugging_face(source.name, revision, local_files_only, list(patterns))
        return _from_modelscope(source.name, revision, local_files_only, list(patterns))
    except UserError:
        raise
    except Exception as error:  # a hub's client raises many kinds, all of which mean the same to the user
        raise UserError(
            f"{source}: neither a local directory nor a {_model(source)} that can be downloaded ({_line(error)})"
        ) from error


def download_configuration(source: ModelSource) -> Path:
    """Return a directory with the config.json of a hub's model, and perhaps nothing else.

    Raises:
        UserError: it can't be downloaded; the message does not name the model.
    """
    try:
        if source.use_hf:
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(source.name, _CONFIGURATION, revision=source.revision)).parent
        _require_modelscope(source.name)
        from modelscope.hub.file_download import model_file_download

        return Path(model_file_download(source.name, _CONFIGURATION, revision=source.revision)).parent
    except UserError:
        raise
    except Exception as error:  # of the hub's client, and of its connections
        raise UserError(
            f"its config.json can't be downloaded ({type(error).__name__}: {_line(error)[:200]})"
        ) from error


def _from_hugging_face(name: str, revision: str | None, local_files_only: bool, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=local_files_only))


def _from_modelscope(name: str, revision: str | None, local_files_only: bool, patterns: list[str]) -> Path:
    """Return the directory, also where the hub can't be reached and the cache has the files."""
    _require_modelscope(name)
    from modelscope import snapshot_download

    options = {"revision": revision, "allow_patterns": patterns}
    if local_files_only:
        return Path(snapshot_download(name, **options, local_files_only=True))
    try:
        return Path(snapshot_download(name, **options))
    except Exception:
        try:
            return Path(snapshot_download(name, **options, local_files_only=True))
        except Exception:
            pass
        raise


def _require_modelscope(name: str) -> None:
    try:
        import modelscope  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{name}: models of ModelScope need its library, which is not installed here (pip install modelscope); or "
            "set student.use_hf to true"
        ) from error


def _model(source: ModelSource) -> str:
    return "hub model" if source.use_hf else "model of ModelScope"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
