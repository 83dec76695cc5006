"""vLLM as its documentation uses it: `LLM.generate` of one process's share of a step's samples."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from bench.ppo.workers import profile, serve, worker_arguments

KV_CACHE_BYTES = 1 << 28


def main() -> None:
    parser = argparse.ArgumentParser()
    worker_arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    engine = LLM(
        model=arguments.model,
        dtype=arguments.dtype,
        max_model_len=32 + arguments.response_tokens,
        max_num_seqs=arguments.samples,
        enforce_eager=True,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        distributed_executor_backend="uni",
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        disable_log_stats=True,
    )
    tokenizer = engine.get_tokenizer()
    own = arguments.samples // arguments.share
    lines = Path(arguments.prompts).read_text("utf-8").splitlines()[: own // arguments.samples_per_prompt]
    prompts = [TokensPrompt(prompt_token_ids=tokenizer(json.loads(line)["prompt"]).input_ids) for line in lines]
    batch = [prompt for prompt in prompts for _ in range(arguments.samples_per_prompt)]
    sampling = [
        SamplingParams(
            temperature=1.0,
            max_tokens=arguments.response_tokens,
            ignore_eos=True,
            logprobs=0,
            seed=seed,
            detokenize=False,
        )
        for seed in range(len(batch))
    ]

    def generate() -> None:
        engine.reset_prefix_cache()
        outputs = engine.generate(batch, sampling, use_tqdm=False)
        if any(len(output.outputs[0].token_ids) != arguments.response_tokens for output in outputs):
            raise RuntimeError("a response is not of full length")

    if arguments.profile:
        profile(generate)
    else:
        serve({"generate": generate})


if __name__ == "__main__":
    main()
