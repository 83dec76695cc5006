"""Everything a run reads, checked before any actor starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_ray.config.settings import PPOConfig, PromptSettings
from rlhf_ray.data.prompts import PromptSet, load_prompts
from rlhf_ray.failures import BadInput
from rlhf_ray.models.loading import (
    ModelFacts,
    check_attention,
    check_language_model,
    check_packed_rows,
    check_tokenizer_fits,
    check_top_layers,
    read_model_facts,
)
from rlhf_ray.models.policy import PolicyFacts, read_policy
from rlhf_ray.models.sizes import ModelSize
from rlhf_ray.reward.core.source import RewardSource


@dataclass(frozen=True)
class Inputs:
    """What was read.

    Attributes:
        eos_token_id: ends a response.
        context_tokens: longest prompt and response together.
        prompts: to train on.
        held_out: to judge on, or None.
        rewards: where they come from, in the order of the configuration.
        trunk_sharers: see `trunk_sharers`.
        size: of the policy; None where stub roles stand in for it.
    """

    eos_token_id: int
    context_tokens: int
    prompts: PromptSet
    held_out: PromptSet | None
    rewards: tuple[RewardSource, ...]
    trunk_sharers: frozenset[str] = frozenset()
    size: ModelSize | None = None


def read_inputs(config: PPOConfig) -> Inputs:
    """Read and check models, tokenizers and prompts.

    Raises:
        BadInput: naming the key or the file and line.
    """
    policy = read_policy(config.policy)
    check_reference(config, policy)
    check_critic(config, policy)
    rewards = tuple(
        RewardSource.read(source, key) for source, key in zip(config.reward, source_keys(config), strict=True)
    )
    held_out = config.evaluation.prompts
    return Inputs(
        eos_token_id=int(policy.tokenizer.eos_token_id),
        context_tokens=context_tokens(config, policy),
        prompts=read_prompts(config, policy, config.prompts, "prompts.path", rewards),
        held_out=read_prompts(config, policy, held_out, "evaluation.prompts.path", rewards) if held_out else None,
        rewards=rewards,
        trunk_sharers=trunk_sharers(config, policy.facts.num_layers),
        size=policy.size,
    )


def check_reference(config: PPOConfig, policy: PolicyFacts) -> None:
    """See that a reference of its own goes with the policy.

    Raises:
        BadInput: naming the key.
    """
    if config.reference_role is not None:
        check_attention(config.reference_role.attention, "reference.attention")
    if config.reference_role is not None and config.reference_role.model is not None:
        reference = config.reference_role.model
        facts = read_model_facts(reference, "reference.model")
        check_tokenizer_fits(policy.tokenizer, facts, config.policy.model, "reference.model")
        _check_context(config, policy, facts, "reference.model")
        check_language_model(facts, reference, "reference.model")


def check_critic(config: PPOConfig, policy: PolicyFacts) -> None:
    """See that the critic's backbone goes with the policy.

    Raises:
        BadInput: naming the key.
    """
    if config.critic is not None:
        facts = policy.facts
        if config.critic.model is not None:
            facts = read_model_facts(config.critic.model, "critic.model")
            check_tokenizer_fits(policy.tokenizer, facts, config.policy.model, "critic.model")
            _check_context(config, policy, facts, "critic.model")
            check_packed_rows(config.critic.model, "critic.model")
        check_top_layers(config.critic.learner.trainable_top_layers, facts, "critic.learner.trainable_top_layers")
        check_attention(config.critic.learner.attention, "critic.learner.attention")


def _check_context(config: PPOConfig, policy: PolicyFacts, facts: ModelFacts, key: str) -> None:
    """See that a model takes what the policy writes.

    Raises:
        BadInput: it takes less.
    """
    longest = context_tokens(config, policy)
    if facts.context_tokens < longest:
        raise BadInput(
            key,
            f"a model of at most {facts.context_tokens} tokens",
            f"at least {longest}, as long as prompt and response may be together (sampling)",
        )


def read_prompts(
    config: PPOConfig, policy: PolicyFacts, settings: PromptSettings, key: str, rewards: Sequence[RewardSource]
) -> PromptSet:
    """Read and check prompts, and see that the reward models can be shown them.

    Args:
        key: of their path.

    Raises:
        BadInput: naming the key or the file and line.
    """
    prompts = load_prompts(
        settings,
        policy.tokenizer,
        max_prompt_tokens=config.sampling.max_prompt_tokens,
        context_tokens=policy.facts.context_tokens,
        max_response_tokens=config.sampling.max_response_tokens,
        key=key,
        section="sampling",
    )
    first_chat = [prompt.messages for prompt in prompts if prompt.messages is not None][:1]
    for reward in rewards:
        reward.check_prompts(first_chat)
    return prompts


def context_tokens(config: PPOConfig, policy: PolicyFacts) -> int:
    """Longest prompt and response together."""
    return min(policy.facts.context_tokens, config.sampling.max_prompt_tokens + config.sampling.max_response_tokens)


def source_keys(config: PPOConfig) -> list[str]:
    """Where each source of rewards is in the configuration: `reward`, or `reward.<place>` in a list."""
    several = len(config.reward) > 1
    return [f"reward.{place}" if several else "reward" for place in range(len(config.reward))]


def trunk_sharers(config: PPOConfig, num_layers: int) -> frozenset[str]:
    """Which of `policy` and `critic` have frozen layers in common with the reference, which computes them for all.

    The states are handed over as they are, so all must come from the same model and compute in the same type.

    Args:
        num_layers: of the policy.
    """
    policy, reference, critic = config.policy, config.reference_role, config.critic
    trained = policy.learner.trainable_top_layers
    if trained is None or trained >= num_layers or reference is None:
        return frozenset()
    wanted = (policy.model, policy.learner.dtype, policy.learner.gpus > 0)
    if (reference.model or policy.model, reference.dtype, reference.gpus > 0) != wanted:
        return frozenset()
    if critic is None or critic.learner.trainable_top_layers != trained:
        return frozenset({"policy"})
    same = (critic.model or policy.model, critic.learner.dtype, critic.learner.gpus > 0) == wanted
    return frozenset({"policy", "critic"}) if same else frozenset({"policy"})
