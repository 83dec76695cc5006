"""The forward and training passes of a step as one would write them by hand: transformers, torch, and no more.

All sequences are of one length, so a batch has no padding, needs no mask, and is what a packed row would hold. The
policy's copy serves as the reference: the work is the same. bfloat16 trains with float32 master weights and gradients.
Where several processes share a step, each updates its part of the parameters, as ZeRO does, and none sends anything: a
bound from below.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.ppo.workers import profile, serve, worker_arguments
from rlhf_ray.models.products import prefer_onednn

KL_COEFFICIENT = 0.05
CLIP = 0.2


class BareLearner:
    """One GRPO update of all weights.

    Args:
        sequences: `[S, P + R]` of this process.
        micro_batch: sequences in one forward and backward pass.
        share: this process updates 1 / share of the parameters.
    """

    def __init__(self, model: Any, sequences: torch.Tensor, prompt_tokens: int, micro_batch: int, share: int) -> None:
        self._model, self._sequences = model, sequences
        self._prompt_tokens, self._micro_batch = prompt_tokens, micro_batch
        self._parameters = list(model.parameters())
        is_float32 = self._parameters[0].dtype == torch.float32
        self._masters = self._parameters if is_float32 else [_master(parameter) for parameter in self._parameters]
        self._optimizer = torch.optim.AdamW(
            _own_part(self._masters, share), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self._reference = self.logprobs()
        self._advantages = torch.randn(len(sequences), 1, generator=torch.Generator().manual_seed(0))

    def _micro_batches(self) -> Iterator[slice]:
        for start in range(0, len(self._sequences), self._micro_batch):
            yield slice(start, start + self._micro_batch)

    def _forward(self, sequences: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[S, R, V]` log-probabilities of the response positions, and `[S, R]` of the sampled tokens."""
        hidden = self._model.model(sequences, use_cache=False).last_hidden_state[:, self._prompt_tokens - 1 : -1]
        distribution = self._model.lm_head(hidden).float().log_softmax(-1)
        return distribution, distribution.gather(-1, sequences[:, self._prompt_tokens :, None])[..., 0]

    @torch.no_grad()
    def logprobs(self) -> torch.Tensor:
        """`[S, R]` of the sampled tokens: what a reference, or a learner's first look at a rollout, computes."""
        return torch.cat([self._forward(self._sequences[chosen])[1] for chosen in self._micro_batches()])

    def update(self) -> None:
        """Loss, gradients and optimizer step over all sequences."""
        tokens = self._reference.numel()
        for chosen in self._micro_batches():
            distribution, logprobs = self._forward(self._sequences[chosen])
            with torch.no_grad():
                # A trainer logs it.
                -(distribution.exp() * distribution).sum(-1)
            ratio = (logprobs - logprobs.detach()).exp()
            advantages = self._advantages[chosen]
            surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
            log_ratio = self._reference[chosen] - logprobs
            penalty = torch.expm1(log_ratio) - log_ratio
            ((KL_COEFFICIENT * penalty - surrogate).sum() / tokens).backward()
            self._gather_gradients()
        nn.utils.clip_grad_norm_(self._masters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)
        if self._masters is not self._parameters:
            with torch.no_grad():
                torch._foreach_copy_(self._parameters, self._masters)

    def _gather_gradients(self) -> None:
        """Into the float32 masters, a micro-batch at a time."""
        if self._masters is self._parameters:
            return
        torch._foreach_add_([each.grad for each in self._masters], [each.grad for each in self._parameters])
        self._model.zero_grad(set_to_none=True)


def _master(parameter: nn.Parameter) -> nn.Parameter:
    master = nn.Parameter(parameter.detach().float())
    master.grad = torch.zeros_like(master)
    return master


def _own_part(parameters: list[nn.Parameter], share: int) -> list[nn.Parameter]:
    """1 / share of the parameters by size; only whole ones, so a little more."""
    wanted = sum(each.numel() for each in parameters) / share
    chosen: list[nn.Parameter] = []
    for parameter in sorted(parameters, key=nn.Parameter.numel, reverse=True):
        if sum(each.numel() for each in chosen) + parameter.numel() <= wanted * 1.02:
            chosen.append(parameter)
    return chosen


def score_texts(folder: str, prompts: list[str], count: int) -> Any:
    """Scoring as many texts as there are samples, in one batch."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [prompts[index % len(prompts)] * 8 for index in range(count)]

    @torch.inference_mode()
    def score() -> None:
        model(**tokenizer(texts, return_tensors="pt", padding=True, truncation=True))

    return score


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser()
    worker_arguments(parser)
    parser.add_argument("--reward-model", required=True)
    parser.add_argument("--micro-batch", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prefer_onednn()
    torch.manual_seed(0)
    prompts = [json.loads(line)["prompt"] for line in Path(arguments.prompts).read_text("utf-8").splitlines()]
    prompt_ids = torch.tensor(AutoTokenizer.from_pretrained(arguments.model)(prompts).input_ids)
    own = arguments.samples // arguments.share
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype), attn_implementation="sdpa"
    )
    responses = torch.randint(3, model.config.vocab_size, (own, arguments.response_tokens))
    chosen = prompt_ids[torch.arange(own) // arguments.samples_per_prompt]
    learner = BareLearner(
        model, torch.cat([chosen, responses], 1), prompt_ids.shape[1], arguments.micro_batch, arguments.share
    )
    tasks = {
        "reference": learner.logprobs,
        "train": learner.update,
        "score": score_texts(arguments.reward_model, prompts, own),
    }
    if arguments.profile:
        profile(tasks[arguments.profile])
    else:
        serve(tasks)


if __name__ == "__main__":
    main()
