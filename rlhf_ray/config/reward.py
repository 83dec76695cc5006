"""Where rewards come from: the settings of scorers."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from rlhf_ray.config.base import ActorSettings, DType, PositiveFloat, PositiveInt


class ScorerSettings(ActorSettings):
    """How a reward model scores."""

    dtype: DType = Field("float32", description="Compute type.")
    max_length: PositiveInt | None = Field(
        None,
        description="Longest text in tokens; empty: what the model was trained with "
        "(its card), else its position limit.",
    )
    on_too_long: Literal["fail", "truncate"] = Field(
        "fail", description="A longer text is a failure with its cause, or is cut at the front and counted."
    )
    batch_size: PositiveInt = Field(64, description="Texts in one forward pass.")
    batch_tokens: PositiveInt | None = Field(
        None, description="Tokens of a forward pass, padding included. Empty: 4,096 on a CPU, 32,768 on GPUs."
    )
    batch_invariant: bool = Field(
        False,
        description="Score every text alone, so that its score is bit-for-bit the same whatever else is scored. Takes "
        "several times as long; without it scores differ by rounding. The gate's integrity checks always use it.",
    )

    @model_validator(mode="after")
    def _one_device(self) -> ScorerSettings:
        if self.gpus > 1:
            raise ValueError(f"gpus ({self.gpus:g}) must not be above 1: a scorer computes on one; replicas use others")
        return self


class RewardSettings(ScorerSettings):
    """The reward model that scores responses."""

    model: str = Field(
        description="Directory of a reward model (`rlhf-ray train-rm`), or of any "
        "`AutoModelForSequenceClassification` with one label. With `url`: name of the model in the service; empty "
        "lets the service choose."
    )
    url: str | None = Field(
        None,
        description="Reward service (`rlhf-ray serve-rm`) that scores in place of a model in this run, such as "
        "`http://10.0.0.7:8000`. What concerns the model itself is set there.",
    )
    token_file: str | None = Field(
        None,
        description="File with the service's bearer token, read where the run is started; empty: the environment "
        "variable `RLHF_RAY_TOKEN`, where it is set.",
    )
    timeout_s: PositiveFloat = Field(
        600.0,
        description="How long the service may take to score a shard. Until then what is lost or refused for overload "
        "is sent again; then it is an infrastructure failure.",
    )
    apply_temperature: bool = Field(
        False,
        description="Divide scores by the temperature in the model's card, so that σ of a difference is the calibrated "
        "probability that people prefer the one to the other.",
    )
    require_release: bool = Field(
        True,
        description="Refuse a model that the release gate refused (its card says so); one without a verdict is used.",
    )

    @model_validator(mode="before")
    @classmethod
    def _a_service_knows_its_model(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("url") is not None and values.get("model") is None:
            return {**values, "model": ""}
        return values

    @model_validator(mode="after")
    def _model_or_service(self) -> RewardSettings:
        if self.url is None:
            if not self.model:
                raise ValueError("model: it is empty; a directory, or url for the address of a reward service")
            return self
        place = urlsplit(self.url)
        if place.scheme not in ("http", "https") or not place.hostname:
            raise ValueError("url: a reward service's address begins with http:// or https:// and names a host")
        if "@" in place.netloc:
            # The configuration is kept in the run's folder.
            raise ValueError("url: it holds a token; put that into token_file or RLHF_RAY_TOKEN")
        for name in ("max_length", "batch_invariant", "gpus"):
            if vars(self)[name] != type(self).model_fields[name].default:
                raise ValueError(f"{name}: with url the model is the service's; set it there")
        return self
