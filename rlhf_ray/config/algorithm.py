"""How samples become a better policy: the settings of the algorithm."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlhf_ray.config.base import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Settings


class KLSettings(Settings):
    """The leash to the reference model."""

    coefficient: NonNegativeFloat = Field(
        0.05, description="β, weight of the KL penalty in nats (first value of the adaptive controller)."
    )
    estimator: Literal["k1", "k2", "k3"] = Field("k1", description="Per-token estimator of the KL divergence.")
    placement: Literal["reward", "loss"] = Field(
        "reward", description="Subtract β·KL from the reward of each token, or add it to the loss."
    )
    controller: Literal["fixed", "adaptive"] = Field(
        "fixed",
        description="`adaptive` moves β so that `kl/reference` "
        "stays near the target (Ziegler et al. 2019, section 2.2).",
    )
    target: PositiveFloat = Field(6.0, description="Target of the adaptive controller, nats a sequence.")
    horizon: PositiveInt = Field(10000, description="Samples over which the adaptive controller corrects.")
    stop_above: PositiveFloat | None = Field(
        None, description="End the run, keeping the policy, when `kl/reference` exceeds this many nats a sequence."
    )


class AlgorithmSettings(Settings):
    """Proximal policy optimisation and its relatives."""

    advantage: Literal["gae", "rloo", "grpo"] = Field(
        "gae",
        description="`gae` needs a critic; `rloo` (leave-one-out) and `grpo` (group-standardised) need at least two "
        "samples a prompt and no critic.",
    )
    max_staleness: NonNegativeInt = Field(
        0,
        description="Steps that sampling may run ahead of training. Step s is sampled with the weights of version "
        "s − n exactly, so that a run with one seed is the same to the bit whatever n. 0: everyone waits for everyone.",
    )
    in_flight_updates: bool = Field(
        False,
        description="Load newer weights between two steps of the engine while responses are unfinished: none waits for "
        "the longest. Every token carries its own version, none older than `max_staleness` allows; two runs of a seed "
        "are then no longer equal. Needs `max_staleness` above 0.",
    )
    gamma: Fraction = Field(1.0, description="Discount γ.")
    gae_lambda: Fraction = Field(0.95, description="GAE λ.")
    epochs: PositiveInt = Field(1, description="Passes over the samples of a step.")
    minibatches: PositiveInt = Field(1, description="Optimizer steps in each pass.")
    clip_low: PositiveFloat = Field(0.2, description="Ratio is clipped below 1 − this.")
    clip_high: PositiveFloat = Field(0.2, description="Ratio is clipped above 1 + this.")
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(
        None, description="Lower bound of the loss for negative advantages (Ye et al. 2020); empty: off."
    )
    value_clip: PositiveFloat | None = Field(
        None,
        description="Clip values to ± this around the old ones in the value loss; empty: off. It limits how far a "
        "critic moves in one step, whatever the scale of the rewards: one that starts at 0 then needs (return / "
        "clip) steps to reach the returns.",
    )
    critic_warmup_steps: NonNegativeInt = Field(
        0,
        description="First steps in which only the critic is trained. The policy is measured but not updated, so that "
        "its first updates do not follow the advantages of a critic that knows nothing.",
    )
    entropy_coefficient: NonNegativeFloat = Field(0.0, description="Weight of the entropy bonus.")
    reward_whiten: bool = Field(False, description="Standardise the scores of a step before shaping.")
    advantage_whiten: bool = Field(
        True, description="Standardise the advantages of a step over all its response tokens."
    )
    score_clip: PositiveFloat | None = Field(None, description="Clip scores to ± this; empty: off.")
    missing_eos_penalty: NonNegativeFloat = Field(
        0.0, description="Subtracted from the score of a response that did not end by itself."
    )
    loss_aggregation: Literal["token", "sequence"] = Field(
        "token",
        description="Mean over all tokens of the minibatch, or mean over its sequences of each one's token mean.",
    )
    old_logprobs: Literal["learner", "engine"] = Field(
        "learner",
        description="Denominator of the ratio: computed again by the learner before the first update (ratio is exactly "
        "1 at the start), or as the engine gave them (one forward pass less).",
    )
    importance_cap: PositiveFloat | None = Field(
        2.0,
        description="With `old_logprobs: learner`, truncated importance weight for "
        "the mismatch between engine and learner (Yao et al. 2025); empty: off.",
    )
    kl: KLSettings = Field(default_factory=KLSettings, description="The leash to the reference model.")

    @property
    def asks_old_logprobs(self) -> bool:
        """Whether the policy learner computes its log-probs before it trains.

        With one update a step its training pass computes the same; only a KL penalty in the reward needs them earlier.
        """
        one_update = self.epochs == 1 and self.minibatches == 1
        kl_in_reward = self.kl.placement == "reward" and self.kl.coefficient > 0
        return self.old_logprobs == "learner" and (kl_in_reward or not one_update)
