"""TRL's side of `bench.ppo`, run as a module with TRL on the path; the last line it prints is JSON.

The trainer is set up as its documentation does for such a model, with what would slow it down turned off: gradient
checkpointing (on by default), saving, evaluation and logging. bfloat16 is its own: autocast over float32 weights.
"""

from __future__ import annotations

import argparse
import json
import resource
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found]

from bench.trl_reward_training import StepEnds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--reward-model", required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL with prompt")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--samples", type=int, required=True, help="of a step")
    parser.add_argument("--samples-per-prompt", type=int, required=True)
    parser.add_argument("--micro-batch", type=int, required=True, help="samples in one forward and backward pass")
    parser.add_argument("--response-tokens", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with arguments.prompts.open(encoding="utf-8") as lines:
        prompts = Dataset.from_list([json.loads(line) for line in lines])
    step_ends = StepEnds()
    with TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=arguments.model,
            reward_funcs=arguments.reward_model,
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=arguments.micro_batch,
                gradient_accumulation_steps=arguments.samples // arguments.micro_batch,
                num_generations=arguments.samples_per_prompt,
                max_completion_length=arguments.response_tokens,
                max_steps=arguments.steps,
                beta=0.05,
                learning_rate=1e-6,
                lr_scheduler_type="constant",
                adam_beta2=0.95,
                model_init_kwargs={"dtype": "float32"},
                bf16=arguments.dtype == "bfloat16",
                gradient_checkpointing=False,
                use_cpu=True,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=prompts,
            callbacks=[step_ends],
        )
        lengths: list[float] = trainer._metrics["train"]["completions/min_length"]
        trainer.train()
    print(
        json.dumps(
            {
                "step_ends_s": step_ends.seconds,
                "shortest_response": min(lengths),
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
