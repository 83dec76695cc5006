"""What is read of a policy, and checked, before anything is started."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rlhf_ray.config.settings import PolicySettings
from rlhf_ray.models.adapters import check_adapters
from rlhf_ray.models.loading import (
    ModelFacts,
    check_attention,
    check_language_model,
    check_tokenizer_fits,
    check_top_layers,
    load_policy_tokenizer,
    read_model_facts,
)
from rlhf_ray.models.sizes import ModelSize, read_model_size


@dataclass(frozen=True)
class PolicyFacts:
    """What can be known of a policy without loading it."""

    settings: PolicySettings
    facts: ModelFacts
    tokenizer: Any

    @cached_property
    def size(self) -> ModelSize:
        """As its learner builds it."""
        settings = self.settings
        return read_model_size(
            settings.model, trained_top_layers=settings.learner.trainable_top_layers, lora=settings.lora
        )


def read_policy(settings: PolicySettings) -> PolicyFacts:
    """Read and check a policy's directory.

    Raises:
        BadInput: naming the key.
    """
    model, key = settings.model, "policy.model"
    facts = read_model_facts(model, key)
    tokenizer = load_policy_tokenizer(model, key)
    check_tokenizer_fits(tokenizer, facts, model, key)
    check_language_model(facts, model, key)
    check_top_layers(settings.learner.trainable_top_layers, facts, "policy.learner.trainable_top_layers")
    check_attention(settings.learner.attention, "policy.learner.attention")
    check_adapters(model, settings.lora, "policy.lora.target_modules")
    return PolicyFacts(settings, facts, tokenizer)
