"""Find another tool's settings in a file: the tool, its command in a script, and the options."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_gkd.config import yaml_text
from megatron_gkd.errors import UserError
from megatron_gkd.migration.script import ShellCommand, read_commands

TOOLS = ("swift", "trl", "nemo")
NAMES = {"swift": "ms-swift", "trl": "TRL", "nemo": "NeMo-RL"}
_SHELL = (".sh", ".bash", ".slurm", ".sbatch", ".txt")
_SWIFT_SCRIPT = re.compile(r"(.*/)?swift/cli/(_megatron/)?rlhf\.py")
_TRL_SCRIPT = re.compile(r"(.*/)?\w*gkd\w*\.py")
_NEMO_SCRIPT = re.compile(r"(.*/)?run_distillation\w*\.py")
_TRL_NAMES = ("teacher_model_name_or_path", "model_name_or_path", "dataset_name")
_SWIFT_NAMES = ("rlhf_type", "teacher_model", "teacher_model_server", "tuner_type", "train_type", "use_vllm")


@dataclass(frozen=True)
class Source:
    """Another tool's settings.

    Attributes:
        path: the file.
        tool: swift, trl or nemo.
        place: the command that was found and its line; "" in a YAML file.
        launcher: the words of a command up to its options.
        options: the words after those.
        environment: variables of the command.
        settings: the content of a YAML file.
        is_megatron: whether it is Megatron-SWIFT.
    """

    path: Path
    tool: str
    place: str = ""
    launcher: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    is_megatron: bool = False


def read_source(path: Path, tool: str | None) -> Source:
    """Return the settings of a script or YAML file.

    Args:
        path: the file.
        tool: swift, trl or nemo; None to find it out.

    Raises:
        UserError: the file can't be read, or has no such settings.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read: {getattr(error, 'strerror', None) or 'is no text'}") from error
    if path.suffix in _SHELL or (path.suffix not in (".yaml", ".yml", ".json") and not _is_mapping(text)):
        return _of_script(path, text, tool)
    return Source(path, *_of_yaml(path, text, tool))


def read_settings(path: Path) -> dict[str, Any]:
    """Return the mapping of a YAML file.

    Raises:
        UserError: there is none.
    """
    try:
        found = yaml_text.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: must be a mapping of settings")
    return {str(name): value for name, value in found.items()}


def _is_mapping(text: str) -> bool:
    try:
        return isinstance(yaml_text.parse(text), dict)
    except ValueError:
        return False


def _of_yaml(path: Path, text: str, tool: str | None) -> Any:
    settings = read_settings(path)
    if tool is None:
        if "policy" in settings or "distillation" in settings or settings.get("defaults"):
            tool = "nemo"
        elif any(name in settings for name in _TRL_NAMES):
            tool = "trl"
        elif any(name in settings for name in _SWIFT_NAMES):
            tool = "swift"
        else:
            raise UserError(f"{path}: settings of no tool that is known; name the tool with --from {'|'.join(TOOLS)}")
    is_megatron = tool == "swift" and ("micro_batch_size" in settings or "tensor_model_parallel_size" in settings)
    return tool, "", (), (), {}, settings, is_megatron


def _of_script(path: Path, text: str, tool: str | None) -> Source:
    try:
        commands = list(read_commands(text))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    found = [source for command in commands if (source := _of_command(path, command, tool))]
    if not found:
        raise UserError(
            f"{path}: has no command that is known: megatron rlhf, swift rlhf, a script of TRL (gkd.py) or of NeMo-RL "
            f"(run_distillation.py); with --from {'|'.join(TOOLS)}, the first command with options is read"
        )
    return found[0]


def _of_command(path: Path, command: ShellCommand, tool: str | None) -> Source | None:
    """Return the settings of a command; None where it is none of the tool."""
    for index, word in enumerate(command.words):
        kind, after = _tool_of(command.words, index)
        if kind is not None and tool in (None, kind):
            is_megatron = PurePosixPath(word).name == "megatron" or "/_megatron/" in word
            return _source(path, kind, command, after, is_megatron=is_megatron)
    starts = [index for index, word in enumerate(command.words) if word.startswith("--")]
    if tool is not None and starts:
        return _source(path, tool, command, starts[0], is_megatron="megatron" in command.words)
    return None


def _source(path: Path, tool: str, command: ShellCommand, after: int, *, is_megatron: bool) -> Source:
    launcher = command.words[:after]
    place = f"line {command.line}: {' '.join(launcher[-2:])}"
    return Source(path, tool, place, launcher, command.words[after:], command.environment, is_megatron=is_megatron)


def _tool_of(words: tuple[str, ...], index: int) -> tuple[str | None, int]:
    """Return the tool whose command is at a place of the words, and the place of its options."""
    word, following = words[index], words[index + 1 : index + 2]
    if PurePosixPath(word).name in ("megatron", "swift") and following == ("rlhf",):
        return "swift", index + 2
    if _SWIFT_SCRIPT.fullmatch(word):
        return "swift", index + 1
    if _NEMO_SCRIPT.fullmatch(word):
        return "nemo", index + 1
    if _TRL_SCRIPT.fullmatch(word) or (PurePosixPath(word).name == "trl" and following == ("gkd",)):
        return "trl", index + (1 if _TRL_SCRIPT.fullmatch(word) else 2)
    return None, 0
