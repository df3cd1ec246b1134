"""The recipe: all sections together."""

from typing import Any

from pydantic import model_validator

from megatron_gkd.config import yaml_text
from megatron_gkd.config.schema.base import Section
from megatron_gkd.config.schema.cluster import ClusterSection
from megatron_gkd.config.schema.data import DataSection
from megatron_gkd.config.schema.distill import DistillSection
from megatron_gkd.config.schema.lora import LoraSection
from megatron_gkd.config.schema.megatron import MegatronSection
from megatron_gkd.config.schema.memory import MemorySection
from megatron_gkd.config.schema.output import OutputSection
from megatron_gkd.config.schema.parallel import ParallelSection
from megatron_gkd.config.schema.rollout import RolloutSection
from megatron_gkd.config.schema.student import StudentSection
from megatron_gkd.config.schema.teacher import TeacherSection
from megatron_gkd.config.schema.train import LORA_LR, TrainSection

_DEFAULT_COMPLETION = 512  # tokens


class Recipe(Section):
    """The settings of a whole run. `megatron_gkd.config.load.load` builds one, with all checks."""

    student: StudentSection
    teacher: TeacherSection = TeacherSection()
    distill: DistillSection
    rollout: RolloutSection = RolloutSection()
    parallel: ParallelSection
    data: DataSection
    train: TrainSection
    output: OutputSection
    memory: MemorySection = MemorySection()
    megatron: MegatronSection = MegatronSection()
    cluster: ClusterSection = ClusterSection()
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

    @property
    def rollout_temperature(self) -> float:
        """What divides the logits that the student samples from."""
        chosen = self.rollout.rollout_temperature
        return self.distill.temperature if chosen is None else chosen

    @property
    def max_sampled_length(self) -> int:
        """Tokens of the longest prompt with its completion that the rollout engine can hold."""
        section, most = self.rollout, self.data.max_length
        if section.engine == "vllm" and section.vllm_max_model_len is not None:
            return min(most, section.vllm_max_model_len)
        return most

    @property
    def max_completion_length(self) -> int:
        """Most tokens of a completion: `rollout.max_completion_length`, or what follows from the other lengths."""
        if self.rollout.max_completion_length is not None:
            return self.rollout.max_completion_length
        prompt, longest = self.data.max_prompt_length, self.max_sampled_length
        half = longest // 2 if prompt is None else longest - prompt
        return max(1, min(_DEFAULT_COMPLETION, half, self.teacher_sequence_length // 2))

    @property
    def max_prompt_length(self) -> int:
        """Most tokens of a prompt that the student completes."""
        chosen = self.data.max_prompt_length
        return self.max_sampled_length - self.max_completion_length if chosen is None else chosen

    @property
    def teacher_sequence_length(self) -> int:
        """Tokens of the longest `teacher_prompt` with its response."""
        return self.data.teacher_max_length or self.data.max_length

    @property
    def steps_per_generation(self) -> int:
        """Optimizer steps that train on one generation of the student's completions."""
        section = self.rollout
        if section.generation_batch_size is not None:
            return section.generation_batch_size // self.train.global_batch_size
        return section.steps_per_generation or 1

    def to_yaml(self) -> str:
        """Return every key with its value, as YAML that `load` reads back."""
        return yaml_text.dump(self.model_dump(mode="json"))
