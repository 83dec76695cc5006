"""What a run with stub roles reads: made-up prompts, and a source of stub scorers. No model or data set is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from bench.stubs import StubScorer, StubSettings
from rlhf_ray.config.settings import PPOConfig
from rlhf_ray.data.prompts import Prompt, PromptSet
from rlhf_ray.data.rows import BadRows
from rlhf_ray.ppo.inputs import Inputs
from rlhf_ray.randomness import keyed_generator
from rlhf_ray.reward.core.protocol import Scorer
from rlhf_ray.reward.core.source import RewardSource


@dataclass(frozen=True)
class StubSource(RewardSource):
    """Makes stub scorers."""

    stub: StubSettings = field(default_factory=StubSettings)

    def constructor(self, policy_model: str, place: object = None) -> Callable[[], Scorer]:
        return partial(StubScorer, self.stub)


def stub_inputs(config: PPOConfig, stub: StubSettings, num_prompts: int, num_held_out: int) -> Inputs:
    """Random prompts of up to a quarter of the length that is allowed.

    Args:
        num_held_out: 0 for none.
    """
    longest = max(config.sampling.max_prompt_tokens // 4, 2)

    def prompts(purpose: str, count: int) -> PromptSet:
        made = []
        for index in range(count):
            random = keyed_generator(config.run.seed, purpose, index)
            token_ids = random.integers(3, 1000, random.integers(2, longest + 1)).astype("int32")
            made.append(Prompt(index, token_ids, f"prompt {index}", None))
        return PromptSet(made, BadRows("fail", "prompts.on_bad_row"))

    return Inputs(
        eos_token_id=2,
        context_tokens=config.sampling.max_prompt_tokens + config.sampling.max_response_tokens,
        prompts=prompts("train", num_prompts),
        held_out=prompts("held-out", num_held_out) if num_held_out else None,
        rewards=tuple(StubSource(source, "reward", stub=stub) for source in config.reward),
    )
