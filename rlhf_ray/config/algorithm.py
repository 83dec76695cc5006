"""How samples become a better policy: the settings of the algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from rlhf_ray.config.base import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Settings


class AdvantageNeeds(NamedTuple):
    """What an estimator of advantages asks of a run.

    Attributes:
        critic: values of the states, so a critic section.
        group: other responses to the same prompt, so at least two samples a prompt.
    """

    critic: bool = False
    group: bool = False


ADVANTAGES: Mapping[str, AdvantageNeeds] = {
    "gae": AdvantageNeeds(critic=True),
    "rloo": AdvantageNeeds(group=True),
    "grpo": AdvantageNeeds(group=True),
    "group_mean": AdvantageNeeds(group=True),
    "return_to_go": AdvantageNeeds(),
}
"""Every estimator by its name in the settings; the formulas are in `algorithms/advantages.py`."""


class KLSettings(Settings):
    """KL penalty against the reference model."""

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


class ImportanceSettings(Settings):
    """Correction for responses that another policy sampled than the one the ratio is taken to."""

    level: Literal["token", "sequence"] = Field(
        "token",
        description="A weight for each token, or one for the whole response: the product over its tokens, the only "
        "unbiased weight of a response. Its variance grows with the length.",
    )
    truncate: PositiveFloat | None = Field(2.0, description="Weights are min(w, this); empty: not truncated.")
    mask: tuple[NonNegativeFloat, PositiveFloat] | None = Field(
        None,
        description="`[low, high]`: tokens (or responses) whose weight is outside weigh 0 in the surrogate, and are "
        "counted; empty: none.",
    )

    @model_validator(mode="after")
    def _weights_are_bounded_once(self) -> ImportanceSettings:
        if self.mask is None:
            if self.truncate is None:
                raise ValueError(
                    "truncate: empty, as mask is, so nothing bounds the weights; set one of them, or "
                    "algorithm.importance to null"
                )
            return self
        low, high = self.mask
        if not low < 1 < high:
            raise ValueError(f"mask: [{low:g}, {high:g}] must have 1, the weight of equal policies, inside")
        if self.truncate is not None and self.truncate >= high:
            raise ValueError(
                f"truncate: {self.truncate:g} is never reached, because weights above {high:g} are masked; set it "
                "below, or to null"
            )
        return self


class LengthSettings(Settings):
    """What a response's length does to its score. Lengths count the tokens that the policy sampled."""

    penalty: NonNegativeFloat = Field(0.0, description="Subtracted from the score for each token; 0: off.")
    target: PositiveInt | None = Field(
        None, description="`penalty` is for each token more or less than this; empty: for each token."
    )
    rescale: NonNegativeFloat = Field(
        0.0,
        description="α: a positive score is divided by 1 + α · length / mean length of the prompt's responses; 0: off.",
    )
    overlong_buffer: PositiveInt | None = Field(
        None,
        description="Over the last so many tokens before `sampling.max_response_tokens` a penalty grows from 0 to "
        "`overlong_penalty` (DAPO's soft overlong punishment); empty: off.",
    )
    overlong_penalty: PositiveFloat = Field(
        1.0, description="Subtracted from the score of a response that is as long as it may be."
    )

    @model_validator(mode="after")
    def _a_target_has_a_penalty(self) -> LengthSettings:
        if self.target is not None and not self.penalty:
            raise ValueError(f"target: {self.target} has no effect while penalty is 0")
        return self


class AlgorithmSettings(Settings):
    """Proximal policy optimisation and its relatives."""

    advantage: Literal["gae", "rloo", "grpo", "group_mean", "return_to_go"] = Field(
        "gae",
        description="`gae` needs a critic. `rloo` (leave-one-out), `grpo` (group-standardised) and `group_mean` (less "
        "the group's mean) need at least two samples a prompt. `return_to_go` (rewards to come) needs neither.",
    )
    max_staleness: NonNegativeInt = Field(
        0,
        description="Steps that sampling may run ahead of training. Step s is sampled with the weights of version "
        "max(0, s − n) exactly, so for every n two runs with the same seed are bit-for-bit equal (runs with different "
        "n are not). 0: sampling and training take turns.",
    )
    in_flight_updates: bool = Field(
        False,
        description="Load newer weights between two steps of the engine while responses are unfinished: none waits for "
        "the longest. Every token carries its own version, none older than `max_staleness` allows; two runs of a seed "
        "are then no longer equal. Needs `max_staleness` above 0.",
    )
    policy_loss: Literal["ppo", "gspo", "cispo"] = Field(
        "ppo",
        description="`ppo` clips the ratio of each token, `gspo` that of each response (its geometric mean over the "
        "tokens); `cispo` clips the ratio as a constant weight of the log-prob, so that no token loses its gradient.",
    )
    gamma: Fraction = Field(1.0, description="Discount γ, of `gae` and `return_to_go`.")
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
        True,
        description="Standardise the advantages of a step over all its response tokens. Part of `return_to_go` "
        "and usual with `gae`; `rloo`, `grpo` and Dr. GRPO do without.",
    )
    score_clip: PositiveFloat | None = Field(None, description="Clip scores to ± this; empty: off.")
    missing_eos_penalty: NonNegativeFloat = Field(
        0.0, description="Subtracted from the score of a response that was cut at the limit."
    )
    length: LengthSettings = Field(default_factory=LengthSettings, description="Length shaping.")
    mask_truncated: bool = Field(
        False, description="Responses that were cut off take no part in the policy loss, and are counted."
    )
    drop_uniform_groups: bool = Field(
        False,
        description="Prompts whose responses all have the same score take no part in the policy loss, nor in what "
        "it is divided by.",
    )
    loss_aggregation: Literal["token", "sequence", "constant"] = Field(
        "token",
        description="Mean over all tokens of the minibatch; mean over its responses of each one's token mean; or the "
        "sum over its tokens, divided by its responses times `sampling.max_response_tokens`.",
    )
    old_logprobs: Literal["learner", "engine"] = Field(
        "learner",
        description="Denominator of the ratio: computed again by the learner before the first update (ratio is exactly "
        "1 at the start), or as the engine gave them (one forward pass less).",
    )
    importance: ImportanceSettings | None = Field(
        default_factory=ImportanceSettings,
        description="Importance weights π_old / π_engine with `old_logprobs: learner`, where the policy in the ratio "
        "is not the one that sampled; null: off, as it must be with `old_logprobs: engine`.",
    )
    kl: KLSettings = Field(default_factory=KLSettings, description="KL penalty against the reference model.")

    @model_validator(mode="after")
    def _settings_fit_each_other(self) -> AlgorithmSettings:
        if self.old_logprobs == "engine" and self.importance is not None:
            raise ValueError(
                "importance: with old_logprobs 'engine' the ratio is already taken to the policy that sampled; set "
                "importance to null"
            )
        if self.policy_loss == "cispo" and self.dual_clip is not None:
            raise ValueError("dual_clip: 'cispo' has a bounded weight and no dual clip; leave it empty")
        if self.length.rescale and self.reward_whiten:
            raise ValueError(
                "length.rescale: scales positive scores, and reward_whiten makes half of them negative; use one of them"
            )
        if self.drop_uniform_groups and not ADVANTAGES[self.advantage].group:
            raise ValueError(f"drop_uniform_groups: '{self.advantage}' does not compare the responses of a prompt")
        return self

    @property
    def asks_old_logprobs(self) -> bool:
        """Whether the policy learner computes its log-probs before it trains.

        With one update a step its training pass computes the same; only a KL penalty in the reward needs them earlier.
        """
        one_update = self.epochs == 1 and self.minibatches == 1
        kl_in_reward = self.kl.placement == "reward" and self.kl.coefficient > 0
        return self.old_logprobs == "learner" and (kl_in_reward or not one_update)
