"""vLLM inside a training process: what it changes in the process is restored before training goes on.

It joins the world that is initialized already ("external launcher"): every rank has an engine, or consecutive ranks
share one by tensor parallelism, all running the same requests.
"""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from megatron_gkd.data.vision.files import load_image
from megatron_gkd.data.vision.processing import ImageProcessing
from megatron_gkd.errors import UserError
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.rollout.base import Sampling
from megatron_gkd.rollout.vllm.completion_response import Sampled
from megatron_gkd.rollout.vllm.engine_arguments import ColocatedOptions, engine_arguments
from megatron_gkd.rollout.vllm.isolation import isolated
from megatron_gkd.rollout.vllm.logit_bias import logit_bias
from megatron_gkd.rollout.vllm.prompt import VllmPrompt, require_same_tokens
from megatron_gkd.rollout.vllm.tied_head import repack_tied_head
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.current_phase import note_progress

# Before vLLM is imported; what the user has set stays.
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",  # every rank would log the same
}


class VllmProcess:
    """This rank's vLLM, whose weights are arbitrary until the first `load`. All ranks make it together.

    Args:
        checkpoint: of the model's architecture.
        options: how vLLM runs.
        images: what the model's processor makes of images; None for a text model.

    Raises:
        UserError: vLLM is not installed, or can't be started with these options.
    """

    def __init__(
        self, checkpoint: Checkpoint, options: ColocatedOptions, images: ImageProcessing | None = None
    ) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise UserError("rollout.engine = vllm: vLLM is not installed beside the trainer; pip install vllm")
        self.on_host, self.vocab_size = portability.builds_on_host(), checkpoint.vocab_size
        self.images = images
        self.can_sleep = options.sleep_level > 0 and not self.on_host
        with isolated():
            for name, value in _ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, not in one of its own
            from vllm import LLM
            from vllm.v1.engine import core

            # It would destroy the world's process group, which is the trainer's.
            core.cleanup_dist_env_and_memory = lambda *args, **kwargs: None
            if self.on_host:
                require_head_dim(checkpoint, _head_dims_on_cpus())
                _communicate_by_gloo()
            try:
                self.llm = LLM(**engine_arguments(checkpoint.path, options, images, on_host=self.on_host))
            except (ValueError, RuntimeError, AssertionError, TypeError, ImportError) as error:
                reason = " ".join(str(error).split())
                raise UserError(f"rollout.engine = vllm: vLLM can't be started: {reason}") from error
            gc.unfreeze()
        _note_each_step(self.llm)

    def load(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Load whole tensors under their Hugging Face names; the same on every rank, which takes its share."""
        with isolated():
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(named_tensors)})
            if self.on_host:
                self.llm.apply_model(repack_tied_head)
            # Its blocks hold keys and values of the old weights.
            if not self.llm.reset_prefix_cache():
                raise RuntimeError("vLLM's prefix cache is in use and can't be reset")
            if self.images is not None:  # vLLM's worker has dropped the embeddings of images, its scheduler has not
                self.llm.llm_engine.reset_encoder_cache()

    def generate(
        self, prompts: Sequence[VllmPrompt], seeds: Sequence[int], max_tokens: Sequence[int], sampling: Sampling
    ) -> list[Sampled]:
        """Generate one completion a prompt, in order. Only `stop_token_ids` and `stop` end a completion early.

        Ranks of one engine call it together. Token ids in, token ids out: text is decoded only to find stop strings.

        Raises:
            UserError: an image can't be read, or vLLM makes other tokens of one than the model's processor.
        """
        from vllm import SamplingParams

        if not prompts:
            return []
        bias = logit_bias(sampling, self.vocab_size)
        parameters = [
            SamplingParams(
                max_tokens=limit,
                temperature=sampling.temperature,
                top_k=sampling.top_k or 0,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                repetition_penalty=sampling.repetition_penalty,
                seed=seed % 2**63,  # vLLM takes -1 for none
                ignore_eos=True,
                stop_token_ids=list(sampling.stop_token_ids),
                stop=list(sampling.stop),
                include_stop_str_in_output=True,
                skip_special_tokens=False,  # a stop string may be of such tokens
                logprobs=0,  # of the sampled token alone
                detokenize=bool(sampling.stop),
                logit_bias=bias,
            )
            for seed, limit in zip(seeds, max_tokens, strict=True)
        ]
        requests = [_build_request(prompt) for prompt in prompts]
        with isolated():
            outputs = self.llm.generate(requests, parameters, use_tqdm=False)
        for prompt, output in zip(prompts, outputs, strict=True):
            require_same_tokens(prompt, output.prompt_token_ids, self.images, "rollout.engine = vllm")
        return [_read_output(output.outputs[0]) for output in outputs]

    def sleep(self, level: int) -> None:
        """Free device memory, until `wake_up`; see `ColocatedOptions.sleep_level`. On a CPU it does nothing."""
        if self.can_sleep:
            with isolated():
                self.llm.sleep(level=level)

    def wake_up(self, parts: Sequence[str]) -> None:
        """Allocate the memory of `parts`, of "weights" and "kv_cache", again."""
        if self.can_sleep:
            portability.empty_cache()  # vLLM maps memory by itself, and does not use torch's cache
            with isolated():
                self.llm.wake_up(tags=list(parts))


def _note_each_step(llm: Any) -> None:
    """Let each step of vLLM's engine, a token of each sequence, count as progress of the phase."""
    step = llm.llm_engine.step

    def step_and_note() -> Any:
        note_progress()
        return step()

    llm.llm_engine.step = step_and_note


def require_head_dim(checkpoint: Checkpoint, allowed: Sequence[int]) -> None:
    """Check that vLLM has a kernel for the checkpoint's attention heads: it would fail at the first sample.

    Args:
        checkpoint: of the model.
        allowed: the sizes that have one; none: nothing is checked.

    Raises:
        UserError: there is no kernel.
    """
    config = checkpoint.text_config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if allowed and head_dim not in allowed:
        raise UserError(
            f"{checkpoint.path}: head_dim = {head_dim}: vLLM can't serve this on CPUs; allowed are "
            f"{', '.join(map(str, allowed))}; use rollout.engine = megatron, or another model"
        )


def _build_request(prompt: VllmPrompt) -> dict[str, Any]:
    request: dict[str, Any] = {"prompt_token_ids": list(prompt.rendered_ids)}
    if prompt.images:
        request["multi_modal_data"] = {"image": [load_image(image) for image in prompt.images]}
    return request


def _head_dims_on_cpus() -> list[int]:
    """Return the sizes of attention heads that vLLM's CPU backend has kernels for; none where this vLLM hides them."""
    try:
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        return CPUAttentionBackend.get_supported_head_sizes()
    except (ImportError, AttributeError):  # it has moved
        return []


def _communicate_by_gloo() -> None:
    """Keep vLLM from shared memory, which has one name for all runs on a machine and outlives those that are killed."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False


def _read_output(output: Any) -> Sampled:
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a completion by {output.finish_reason!r}")
    token_ids = list(output.token_ids)
    log_probs = [entry[token].logprob for entry, token in zip(output.logprobs, token_ids, strict=True)]
    return Sampled(token_ids, log_probs, output.finish_reason)
