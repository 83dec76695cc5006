"""The settings of `rlhf-ray train-rm` and `rlhf-ray eval-rm`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf_ray.config.base import (
    Fraction,
    NonNegativeFloat,
    OffIsAWord,
    PositiveFloat,
    PositiveInt,
    Settings,
    check_batch,
)
from rlhf_ray.config.lora import LoraSettings
from rlhf_ray.config.reward import ScorerSettings
from rlhf_ray.config.settings import CheckpointSettings, GeneratorSettings, LearnerSettings, PromptSettings, RunConfig

PREFERENCE = "preference"
"""The attribute that every pair has: which of its responses people prefer."""

JUDGES_WITHOUT_MODEL = ("samples", "vader")
"""Values of `best_of_n.judge` that name no reward model's directory."""

BenchmarkName = Literal["reward-bench", "reward-bench-2", "rm-bench", "judge-bench"]


class PreferenceSettings(Settings):
    """Human comparisons."""

    path: str = Field(description="JSONL or Parquet file, folder, or `datasets` name; rows as in `docs/data.md`.")
    split: str | None = Field(None, description="Split of a `datasets` name.")
    min_gap: NonNegativeFloat | None = Field(
        None, description="Use only pairs whose `gap` (difference of mean ratings) is at least this."
    )
    limit: PositiveInt | None = Field(None, description="Use only the first n rows.")
    on_bad_row: Literal["fail", "skip"] = Field(
        "fail", description="A row that cannot be used ends the run, or is counted, listed and left out."
    )


class RewardTrainingSettings(Settings):
    """The Bradley-Terry model."""

    max_length: PositiveInt = Field(256, description="Longest text in tokens.")
    on_too_long: Literal["fail", "truncate", "skip"] = Field(
        "fail",
        description="A longer text is bad input, is cut at the front and counted, or its pair is left out and counted.",
    )
    batch_size: PositiveInt = Field(32, description="Pairs of one optimizer step, over all ranks.")
    epochs: PositiveInt = Field(1, description="Passes over the pairs.")
    steps: PositiveInt | None = Field(None, description="Optimizer steps; empty: `epochs` passes.")
    dropout: Fraction = Field(0.0, description="Dropout of the backbone during training.")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="Share of the label given to the other answer."
    )
    centering: NonNegativeFloat = Field(
        0.01,
        description="Weight of the squared sum of a pair's scores, which keeps them around 0 (Eisenstein et al. 2023).",
    )
    attributes: list[str] | Literal["found"] = Field(
        default_factory=list,
        description="Attributes of the pairs (helpfulness, safety, …) that get a head of their own beside the "
        "preference; `found`: all that the pairs have. A pair need not have every attribute.",
    )
    lora: LoraSettings | None = Field(None, description="Train low-rank adapters and the head only; empty: off.")
    evaluate_every: PositiveInt | None = Field(
        None, description="Judge on `validation` every n steps and keep the best model; empty: keep the last."
    )
    patience: PositiveInt | None = Field(
        None, description="Stop after so many judgements without a better one; empty: train to the end."
    )


class EnsembleSettings(Settings):
    """An ensemble of reward models, whose disagreement tells how far a score can be trusted (Coste et al. 2023)."""

    members: PositiveInt = Field(1, description="Members; 1: no ensemble.")
    kind: Literal["heads", "independent"] = Field(
        "heads",
        description="`heads`: heads on one trunk, at the price of one model. `independent`: models trained one after "
        "the other with seeds of their own, which disagree more where the data say little.",
    )
    bootstrap: bool = Field(
        True, description="Each member weighs the pairs by Poisson(1) draws of its own (the online bootstrap)."
    )

    @property
    def num_heads(self) -> int:
        """Members that share one trunk."""
        return self.members if self.kind == "heads" else 1

    @property
    def num_models(self) -> int:
        """Members with a trunk of their own."""
        return self.members if self.kind == "independent" else 1


class AggregationSettings(Settings):
    """How heads and members become one score. Fixed when the model is written, and part of its version."""

    members: Literal["mean", "minimum", "mean_minus_variance"] = Field(
        "mean",
        description="Over the members of an ensemble: `mean`, `minimum` (worst case) or `mean_minus_variance` "
        "(mean − λ·variance).",
    )
    variance_weight: NonNegativeFloat = Field(
        0.5, description="λ of `mean_minus_variance`, for scores in a member's standard deviations within a pair."
    )
    attributes: dict[str, float] = Field(
        default_factory=lambda: {PREFERENCE: 1.0},
        description="Weight of each attribute's head in the score; one that is not named counts 0.",
    )
    length_penalty: Annotated[NonNegativeFloat | Literal["off", "fitted"], OffIsAWord] = Field(
        "off",
        description="Subtracted for each token of the text. `fitted`: what the score overpays for a token on the "
        "training pairs, if that is more than chance.",
    )


class JudgementSettings(Settings):
    """What the evaluation computes."""

    bins: PositiveInt = Field(
        10, description="Bins of the reliability diagram, from one half to 1; fewer for less than 50 pairs each."
    )
    gap_bins: PositiveInt = Field(4, description="Ranges of `gap`, of about as many pairs each, for accuracy by gap.")


class GateSettings(Settings):
    """What a reward model must satisfy to be released. Every check that fails is listed with its reason."""

    enabled: bool = Field(True, description="Judge at the end of `train-rm`; `eval-rm` does with `--gate`.")
    min_pairs: PositiveInt = Field(
        300, description="Fewest pairs with a preference; fewer cannot show that a sound model is sound."
    )
    min_prompts: PositiveInt = Field(
        10, description="Fewest prompts that they come from; a row without a prompt counts as one."
    )
    min_accuracy: Fraction = Field(
        0.5, description="The lower end of the accuracy's 95 % interval must be above; 0.5 is chance."
    )
    max_calibration_excess: PositiveFloat = Field(
        0.05,
        description="Expected calibration error, after temperature scaling, above its sampling floor: the upper end of "
        "its 95 % interval must not be above.",
    )
    max_overpaid_length: Fraction = Field(
        0.4,
        description="Share of a typical score difference that is paid for length beyond what people prefer it for: "
        "the upper end of its 95 % interval must not be above.",
    )
    max_leaked_share: Fraction = Field(
        0.0, description="Share of pairs with a text that was trained on, or that the model was chosen by."
    )
    max_failed_share: Fraction = Field(0.0, description="Share of pairs of which a text could not be scored.")
    vllm: bool = Field(True, description="Also score the probes with vLLM's pooling engine, which must agree.")
    max_engine_difference: PositiveFloat = Field(
        1e-5, description="Largest |Δ score| in float32 between our scorer, transformers and vLLM."
    )
    record: bool = Field(
        False, description="`eval-rm --gate` writes its verdict into the model's card, in place of the one in it."
    )
    probes: PositiveInt = Field(32, description="Texts of the integrity checks, taken evenly from the pairs.")


class RewardModelConfig(RunConfig):
    """Everything `rlhf-ray train-rm` reads."""

    pairs: PreferenceSettings = Field(description="Pairs to train on.")
    validation: PreferenceSettings | None = Field(
        None,
        description="Pairs for early stopping and the best model. Not the held-out ones, which judge what was chosen; "
        "a text in both is a leak.",
    )
    held_out: PreferenceSettings | None = Field(None, description="Pairs to judge the result on.")
    model: str = Field(description="Hugging Face directory (or hub id) of the backbone.")
    learner: LearnerSettings = Field(default_factory=LearnerSettings, description="How it is trained.")
    training: RewardTrainingSettings = Field(
        default_factory=RewardTrainingSettings, description="The Bradley-Terry model."
    )
    ensemble: EnsembleSettings = Field(default_factory=EnsembleSettings, description="An ensemble of reward models.")
    aggregation: AggregationSettings = Field(
        default_factory=AggregationSettings, description="How heads and members become one score."
    )
    scorer: ScorerSettings = Field(default_factory=ScorerSettings, description="How the result is judged.")
    judgement: JudgementSettings = Field(default_factory=JudgementSettings, description="What the evaluation computes.")
    gate: GateSettings = Field(default_factory=GateSettings, description="What the result must satisfy.")
    checkpoint: CheckpointSettings = Field(
        default_factory=lambda: CheckpointSettings(every_steps=200), description="Checkpointing."
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> RewardModelConfig:
        training = self.training
        if training.evaluate_every is not None and self.validation is None:
            raise ValueError("training.evaluate_every: needs a validation section with pairs of its own")
        if self.validation is not None and training.evaluate_every is None:
            raise ValueError("validation: nothing is judged on it; set training.evaluate_every too")
        if training.patience is not None and training.evaluate_every is None:
            raise ValueError("training.patience: counts judgements; set training.evaluate_every too")
        if training.lora is not None and self.learner.trainable_top_layers is not None:
            raise ValueError("training.lora: freezes the backbone; leave learner.trainable_top_layers empty")
        if training.attributes != "found":
            known = {PREFERENCE, *training.attributes}
            unknown = sorted(set(self.aggregation.attributes) - known)
            if unknown:
                raise ValueError(
                    f"aggregation.attributes: there is no head '{unknown[0]}'; training.attributes gives "
                    f"{', '.join(sorted(known))}"
                )
        if PREFERENCE in training.attributes:
            raise ValueError(f"training.attributes: '{PREFERENCE}' is always there; name the others only")
        check_batch(training.batch_size, "training.batch_size", self.learner.replicas, "learner")
        return self


class BenchmarkSettings(Settings):
    """A published benchmark in a local file."""

    name: BenchmarkName = Field(description="Which benchmark; its layout and rules are those published.")
    path: str = Field(description="Its file or folder.")


class BestOfNSettings(Settings):
    """Samples of a policy, ranked by the reward model and judged by somebody else."""

    path: str | None = Field(
        None, description="JSONL with `prompt` and `responses` (for `judge: samples` also `judge`); empty: sampled."
    )
    policy: str | None = Field(None, description="Directory of the policy that is sampled from.")
    generator: GeneratorSettings = Field(default_factory=GeneratorSettings, description="The engine.")
    prompts: PromptSettings | None = Field(None, description="Prompts to sample from.")
    samples_per_prompt: PositiveInt = Field(32, description="Largest n.")
    max_prompt_tokens: PositiveInt = Field(256, description="A longer prompt is bad input.")
    max_response_tokens: PositiveInt = Field(64, description="A response is cut off here.")
    temperature: PositiveFloat = Field(1.0, description="Sampling temperature.")
    judge: str = Field(
        description="Who says what a response is worth: `samples` (the `judge` of their rows), `vader` (a lexicon of "
        "sentiment) or the directory of another reward model."
    )

    @model_validator(mode="after")
    def _samples_come_from_somewhere(self) -> BestOfNSettings:
        if self.path is None and (self.policy is None or self.prompts is None):
            raise ValueError("needs `path` with samples, or `policy` and `prompts` to sample from")
        if self.path is None and self.judge == "samples":
            raise ValueError("`judge: samples` needs `path` with samples that were judged")
        return self


class RewardEvaluationConfig(RunConfig):
    """Everything `rlhf-ray eval-rm` reads."""

    model: str = Field(description="Directory of the reward model.")
    pairs: PreferenceSettings = Field(description="Pairs to judge it on, held out from its training.")
    training_pairs: PreferenceSettings | None = Field(
        None,
        description="What it was trained on, to look for leaks beside its own record, where it has one, and instead of "
        "it where it has none.",
    )
    scorer: ScorerSettings = Field(default_factory=ScorerSettings, description="How it scores.")
    judgement: JudgementSettings = Field(default_factory=JudgementSettings, description="What the evaluation computes.")
    benchmarks: list[BenchmarkSettings] = Field(default_factory=list, description="Published benchmarks.")
    best_of_n: BestOfNSettings | None = Field(None, description="Best-of-n against a second judge; empty: off.")
    gate: GateSettings = Field(default_factory=GateSettings, description="What it must satisfy with `--gate`.")
