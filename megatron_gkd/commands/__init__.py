"""The commands of the command line. None imports torch before its work begins."""

from megatron_gkd.commands.checkpoint import checkpoint
from megatron_gkd.commands.of_recipes import check, generate, score, train
from megatron_gkd.commands.parts import Command

COMMANDS: dict[str, Command] = {
    "train": train,
    "check": check,
    "score": score,
    "generate": generate,
    "checkpoint": checkpoint,
}
