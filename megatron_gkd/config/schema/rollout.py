"""The section `rollout`."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from megatron_gkd.config.schema.base import PathText, Section, ServerUrl, StopText, TokenId, as_sequence


class RolloutSection(Section):
    """How the student samples, where distill.lmbda > 0."""

    engine: Literal["megatron", "vllm", "vllm_server"] = Field(
        "megatron",
        description="the rollout backend; megatron: the sharded student itself; vllm: vLLM in the training processes; "
        "vllm_server: vLLM servers that are running",
    )
    max_completion_length: int | None = Field(
        None,
        ge=1,
        description="most tokens of a completion, for which data.max_prompt_length leaves room; null: 512, but at most "
        "half of data.max_length and of data.teacher_max_length, and what max_prompt_length leaves",
    )
    rollout_temperature: float | None = Field(
        None, ge=1e-2, le=1e3, description="divides the logits that are sampled from; null: distill.temperature"
    )
    top_k: int | None = Field(None, ge=1, description="sample from that many most likely tokens only; null: from all")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the most likely tokens of this mass only")
    min_p: float = Field(
        0.0, ge=0, le=1, description="sample from tokens of at least this share of the most likely one's probability"
    )
    repetition_penalty: float = Field(
        1.0, ge=0.5, le=2, description="divides positive logits, and multiplies negative ones, of tokens that occurred"
    )
    num_generations: int = Field(1, ge=1, description="completions of each prompt in a generation")
    steps_per_generation: int | None = Field(
        None, ge=1, description="optimizer steps that train on one generation; null: generation_batch_size, or 1"
    )
    generation_batch_size: int | None = Field(
        None,
        ge=1,
        description="completions of one generation, a multiple of train.global_batch_size; in place of "
        "steps_per_generation",
    )
    max_batch_tokens: int = Field(
        65536,
        ge=1,
        description="megatron: most tokens of keys and values on one data-parallel rank, sequences in progress times "
        "the longest of them; others wait for a place",
    )
    stop_token_ids: Annotated[tuple[TokenId, ...], BeforeValidator(as_sequence)] = Field(
        (),
        description="tokens that end a completion, beside the EOS of student and tokenizer, and the end of a turn of "
        "the chat template",
    )
    stop_words: Annotated[tuple[StopText, ...], BeforeValidator(as_sequence)] = Field(
        (), description="texts that end a completion, which keeps them"
    )
    truncated_completions: Literal["keep", "mask", "drop"] = Field(
        "keep", description="completions that end at max_completion_length: train on, leave without loss, or leave out"
    )
    vllm_tensor_parallel_size: int = Field(1, ge=1, description="vllm: consecutive ranks that share one vLLM engine")
    vllm_gpu_memory_utilization: float = Field(
        0.3, gt=0, le=1, description="vllm: share of each device's memory for vLLM's weights and cache"
    )
    vllm_kv_cache_gib: float | None = Field(
        None, gt=0, description="vllm: its cache in GiB a rank; null: what vllm_gpu_memory_utilization leaves"
    )
    vllm_max_model_len: int | None = Field(
        None, ge=2, description="vllm: longest prompt with its completion, in tokens; null: data.max_length"
    )
    sleep_level: int = Field(
        2,
        ge=0,
        le=2,
        description="vllm: GPU memory that it frees between rollouts: 0 none; 1 its cache, with the weights moved to "
        "host memory; 2 cache and weights",
    )
    enforce_eager: bool = Field(False, description="vllm: without CUDA graphs and compilation; always so on CPUs")
    vllm_max_num_seqs: int | None = Field(
        None, ge=1, description="vllm: most completions that one engine samples at the same time; null: vLLM decides"
    )
    vllm_enable_prefix_caching: bool | None = Field(
        None, description="vllm: keep the cache of prompts that begin alike; null: vLLM decides"
    )
    vllm_enable_expert_parallel: bool = Field(
        False, description="vllm: divide experts, in place of each expert's weights, over an engine's ranks"
    )
    vllm_quantization: str | None = Field(
        None, min_length=1, description="vllm: quantize the weights as they arrive, by this method of vLLM (fp8)"
    )
    vllm_limit_mm_per_prompt: dict[str, int] | None = Field(
        None, description="vllm: most images or videos of a prompt ({image: 5}); null: vLLM decides"
    )
    vllm_engine_kwargs: dict[str, Any] = Field(
        {}, description="vllm: further arguments of vLLM's engine; those that the trainer sets are refused"
    )
    vllm_server_urls: Annotated[tuple[ServerUrl, ...], BeforeValidator(as_sequence)] = Field(
        (), description="vllm_server: addresses of the servers, which share the prompts (http://host:8000)"
    )
    vllm_server_api_key_env: str | None = Field(
        None, min_length=1, description="vllm_server: environment variable with the servers' API key"
    )
    vllm_server_concurrency: int = Field(
        64, ge=1, description="vllm_server: requests in flight, over all servers, of one data-parallel rank"
    )
    vllm_server_timeout_s: float = Field(
        600.0, gt=0, description="vllm_server: longest time of one response, in seconds"
    )
    vllm_server_max_downtime_s: float = Field(
        300.0, ge=0, description="vllm_server: how long a server may be unavailable before the run stops, in seconds"
    )
    weight_sync: Literal["folder", "nccl", "gloo", "lora"] = Field(
        "folder",
        description="vllm_server: new weights go through a shared folder, or vLLM's weight transfer on GPUs (nccl) or "
        "on CPUs (gloo); lora: adapters alone, through the folder, to servers of student.model that load them at run "
        "time",
    )
    weight_sync_dir: PathText | None = Field(
        None,
        description="weight_sync folder and lora: where the folder is, under one path here and on the servers; "
        "null: rollout_weights in output_dir",
    )
    steps_ahead: int = Field(
        0, ge=0, le=1, description="vllm_server: 1 samples a step while the one before it trains, with older weights"
    )
    mismatch_kl_threshold: float | None = Field(
        0.1,
        gt=0,
        description="warn where the engine's log-probabilities differ from the trainer's by more (nats a token)",
    )
