"""The recipe's schema. A field's type and bounds are its validation; its description is its line in --help.

Leaf names are unique over all sections, so that `--beta 1.0` names the same key as `--distill.beta 1.0`. What involves
more than one key, or the file system, is in `config.checks`.
"""

from megatron_gkd.config.schema.base import Section
from megatron_gkd.config.schema.cluster import ClusterSection
from megatron_gkd.config.schema.data import DataSection, DatasetEntry
from megatron_gkd.config.schema.distill import DistillSection
from megatron_gkd.config.schema.lora import LoraSection
from megatron_gkd.config.schema.megatron import MegatronSection
from megatron_gkd.config.schema.memory import MemorySection
from megatron_gkd.config.schema.output import OutputSection
from megatron_gkd.config.schema.parallel import ParallelSection
from megatron_gkd.config.schema.recipe import Recipe
from megatron_gkd.config.schema.rollout import RolloutSection
from megatron_gkd.config.schema.student import StudentSection
from megatron_gkd.config.schema.teacher import OneTeacher, TaggedTeacher, TeacherKind, TeacherSection
from megatron_gkd.config.schema.train import TrainSection

__all__ = [
    "ClusterSection",
    "DataSection",
    "DatasetEntry",
    "DistillSection",
    "LoraSection",
    "MegatronSection",
    "MemorySection",
    "OneTeacher",
    "OutputSection",
    "ParallelSection",
    "Recipe",
    "RolloutSection",
    "Section",
    "StudentSection",
    "TaggedTeacher",
    "TeacherKind",
    "TeacherSection",
    "TrainSection",
]
