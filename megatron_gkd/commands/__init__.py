"""The commands of the command line. None imports torch before its work begins."""

from megatron_gkd.commands.checkpoint import checkpoint
from megatron_gkd.commands.data import data
from megatron_gkd.commands.doctor import doctor
from megatron_gkd.commands.migrate import migrate
from megatron_gkd.commands.of_recipes import check, generate, score, train
from megatron_gkd.commands.parts import Command
from megatron_gkd.commands.plan import plan

COMMANDS: dict[str, Command] = {
    "train": train,
    "check": check,
    "data": data,
    "plan": plan,
    "score": score,
    "generate": generate,
    "checkpoint": checkpoint,
    "doctor": doctor,
    "migrate": migrate,
}
