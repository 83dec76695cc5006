"""Everything a run reads, checked before any actor starts."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_ray.config.settings import PPOConfig, PromptSettings
from rlhf_ray.data.prompts import PromptSet, load_prompts
from rlhf_ray.models.adapters import check_adapters
from rlhf_ray.models.loading import (
    check_language_model,
    check_packed_rows,
    check_tokenizer_fits,
    check_top_layers,
    load_policy_tokenizer,
    read_model_facts,
)
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
    """

    eos_token_id: int
    context_tokens: int
    prompts: PromptSet
    held_out: PromptSet | None
    rewards: tuple[RewardSource, ...]
    trunk_sharers: frozenset[str] = frozenset()


def read_inputs(config: PPOConfig) -> Inputs:
    """Read and check models, tokenizers and prompts.

    Raises:
        BadInput: naming the key or the file and line.
    """
    policy = config.policy.model
    facts = read_model_facts(policy, "policy.model")
    tokenizer = load_policy_tokenizer(policy, "policy.model")
    check_tokenizer_fits(tokenizer, facts, policy, "policy.model")
    check_language_model(facts, policy, "policy.model")
    check_top_layers(config.policy.learner.trainable_top_layers, facts, "policy.learner.trainable_top_layers")
    check_adapters(policy, config.policy.lora, "policy.lora.target_modules")
    if config.reference_role is not None and config.reference_role.model is not None:
        reference = config.reference_role.model
        reference_facts = read_model_facts(reference, "reference.model")
        check_tokenizer_fits(tokenizer, reference_facts, policy, "reference.model")
        check_language_model(reference_facts, reference, "reference.model")
    if config.critic is not None:
        critic = facts
        if config.critic.model is not None:
            critic = read_model_facts(config.critic.model, "critic.model")
            check_tokenizer_fits(tokenizer, critic, policy, "critic.model")
            check_packed_rows(config.critic.model, "critic.model")
        check_top_layers(config.critic.learner.trainable_top_layers, critic, "critic.learner.trainable_top_layers")
    rewards = tuple(
        RewardSource.read(source, key) for source, key in zip(config.reward, source_keys(config), strict=True)
    )
    wanted = config.sampling.max_prompt_tokens + config.sampling.max_response_tokens

    def prompts(settings: PromptSettings, key: str) -> PromptSet:
        return load_prompts(
            settings,
            tokenizer,
            max_prompt_tokens=config.sampling.max_prompt_tokens,
            context_tokens=facts.context_tokens,
            max_response_tokens=config.sampling.max_response_tokens,
            key=key,
            section="sampling",
        )

    held_out = config.evaluation.prompts
    inputs = Inputs(
        eos_token_id=int(tokenizer.eos_token_id),
        context_tokens=min(facts.context_tokens, wanted),
        prompts=prompts(config.prompts, "prompts.path"),
        held_out=prompts(held_out, "evaluation.prompts.path") if held_out else None,
        rewards=rewards,
        trunk_sharers=trunk_sharers(config, facts.num_layers),
    )
    for chosen in (inputs.prompts, inputs.held_out):
        first_chat = [prompt.messages for prompt in chosen or () if prompt.messages is not None][:1]
        for reward in rewards:
            reward.check_prompts(first_chat)
    return inputs


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
