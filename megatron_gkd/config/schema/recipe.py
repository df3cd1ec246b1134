"""The recipe: all sections together."""

from typing import Any

from pydantic import model_validator

from megatron_gkd.config import yaml_text
from megatron_gkd.config.schema.base import Section
from megatron_gkd.config.schema.data import DataSection
from megatron_gkd.config.schema.distill import DistillSection
from megatron_gkd.config.schema.lora import LoraSection
from megatron_gkd.config.schema.output import OutputSection
from megatron_gkd.config.schema.parallel import ParallelSection
from megatron_gkd.config.schema.rollout import RolloutSection
from megatron_gkd.config.schema.student import StudentSection
from megatron_gkd.config.schema.teacher import TeacherSection
from megatron_gkd.config.schema.train import LORA_LR, TrainSection


class Recipe(Section):
    """The settings of a whole run. `megatron_gkd.config.load.load` builds one, with all checks."""

    student: StudentSection
    teacher: TeacherSection
    distill: DistillSection
    rollout: RolloutSection = RolloutSection()
    parallel: ParallelSection
    data: DataSection
    train: TrainSection
    output: OutputSection
    lora: LoraSection | None = None

    @model_validator(mode="before")
    @classmethod
    def _settle_tuner(cls, tree: Any) -> Any:
        """Set what follows from training adapters: their section, and the default of `lr`."""
        train = tree.get("train") if isinstance(tree, dict) else None
        if not isinstance(train, dict):
            return tree
        if train.get("tuner_type") == "lora" and tree.get("lora") is None:
            tree = tree | {"lora": {}}
        if tree.get("lora") is not None and "lr" not in train:
            tree = tree | {"train": train | {"lr": LORA_LR}}
        return tree

    def data_parallel_size(self, world_size: int) -> int:
        """Return the number of replicas of the student over `world_size` processes."""
        p = self.parallel
        return world_size // (p.tensor_model_parallel_size * p.pipeline_model_parallel_size * p.context_parallel_size)

    def expert_data_parallel_size(self, world_size: int) -> int:
        """Return the number of replicas of each expert over `world_size` processes."""
        p = self.parallel
        return world_size // (
            p.expert_tensor_parallel_size * p.expert_model_parallel_size * p.pipeline_model_parallel_size
        )

    def num_microbatches(self, world_size: int) -> int:
        """Return the microbatches of one data-parallel rank in a step without packing, which makes them fewer."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.data_parallel_size(world_size))

    def to_yaml(self) -> str:
        """Return every key with its value, as YAML that `load` reads back."""
        return yaml_text.dump(self.model_dump(mode="json"))
