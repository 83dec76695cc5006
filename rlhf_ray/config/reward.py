"""Where rewards come from: the settings of scorers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, model_validator

from rlhf_ray.config.base import ActorSettings, DType, Fraction, PositiveFloat, PositiveInt, check_sharded


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


_MODEL_ONLY = ("dtype", "max_length", "on_too_long", "batch_tokens", "batch_invariant", "apply_temperature", "sharded")
_SERVICE_TIMEOUT_S, _FUNCTION_TIMEOUT_S = 600.0, 10.0


class RewardSettings(ScorerSettings):
    """A source of rewards: a reward model in this run (`model`), a reward service (`url`), or a function (`function`).
    [rewards.md](rewards.md) explains all three."""

    name: str = Field(
        "",
        description="Names the source in metrics, causes of failures and logs; letters, digits, `_` and `-`. Empty: "
        "`model`, `service`, or the function's own name.",
    )
    weight: float = Field(
        1.0,
        description="The reward is the sum of the sources' scores, each times its weight. A source with weight 0 is "
        "only logged.",
    )
    model: str = Field(
        description="Needed without `url` or `function`. Directory of a reward model (`rlhf-ray train-rm`), or of any "
        "`AutoModelForSequenceClassification` with one label. With `url`: name of the model in the service; empty "
        "lets the service choose."
    )
    url: str | None = Field(
        None,
        description="Reward service (`rlhf-ray serve-rm`) that scores in place of a model in this run, such as "
        "`http://10.0.0.7:8000`. What concerns the model itself is set there.",
    )
    function: str | None = Field(
        None,
        description="Function that scores in place of a model, as `module:name`. The module is looked for in the "
        "folder where the run is started, on `PYTHONPATH`, and among installed packages.",
    )
    token_file: str | None = Field(
        None,
        description="File with the service's bearer token, read where the run is started; empty: the environment "
        "variable `RLHF_RAY_TOKEN`, where it is set.",
    )
    timeout_s: PositiveFloat = Field(
        _SERVICE_TIMEOUT_S,
        description="How long the service may take to score a shard: until then what is lost or refused for overload "
        "is sent again, then it is an infrastructure failure. How long one call of the function may take (default: "
        f"`{_FUNCTION_TIMEOUT_S}`): then its process is ended, and the samples of that call have no score.",
    )
    batch_size: PositiveInt = Field(
        64,
        description="Texts in one forward pass or request. Of a function: samples in one call (default: `1`), which "
        "succeeds or fails as a whole.",
    )
    on_failure: Literal["count", "fail"] = Field(
        "count",
        description="A sample without a score is counted and left out of training, or ends the run with its cause.",
    )
    max_failed_fraction: Fraction = Field(
        0.5,
        description="With `on_failure: count`: a step in which a larger share of the samples has no score of this "
        "source ends the run before it is trained on. Sources of weight 0 are exempt.",
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

    sharded: bool = Field(
        False,
        description="Spread the weights of one model over all `replicas` (ZeRO-3), for a model that does not fit one "
        "GPU. Off: each replica holds all of it.",
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_kind(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        url, function = values.get("url"), values.get("function")
        name = "model"
        defaults: dict[str, Any] = {}
        if url is not None or function is not None:
            name = "service"
            defaults["model"] = ""
        if function is not None:
            name = str(function).rpartition(":")[2].rpartition(".")[2]
            defaults |= {"timeout_s": _FUNCTION_TIMEOUT_S, "batch_size": 1}
        given = {key: value for key, value in values.items() if value is not None or key not in defaults}
        return {**defaults, **given, "name": values.get("name") or name}

    @model_validator(mode="after")
    def _one_kind(self) -> RewardSettings:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise ValueError(f"name: '{self.name}' may have letters, digits, _ and - only")
        if self.function is not None:
            self._check_function(self.function)
        elif self.url is not None:
            self._check_url(self.url)
        elif not self.model:
            raise ValueError("model: it is empty; a directory, or url for the address of a reward service, or function")
        else:
            self._refuse(
                ("timeout_s", "token_file"), "only a service or a function has it, and the model is in this run"
            )
        if self.sharded:
            check_sharded(self)
        return self

    def _check_function(self, function: str) -> None:
        module, _, name = function.partition(":")
        if not all(part.isidentifier() for part in [*module.split("."), *name.split(".")]):
            raise ValueError(f"function: '{function}' is not module:name, such as my_rewards:exact_match")
        self._refuse(("model", "url", "token_file", *_MODEL_ONLY, "require_release"), "with function nothing reads it")

    def _check_url(self, url: str) -> None:
        place = urlsplit(url)
        if place.scheme not in ("http", "https") or not place.hostname:
            raise ValueError("url: a reward service's address begins with http:// or https:// and names a host")
        if "@" in place.netloc:
            # The configuration is kept in the run's folder.
            raise ValueError("url: it holds a token; put that into token_file or RLHF_RAY_TOKEN")
        own = ("max_length", "batch_invariant", "gpus", "sharded", "dtype", "batch_tokens", "require_release")
        self._refuse(own, "with url the model is the service's; set it there")

    def _refuse(self, keys: Sequence[str], reason: str) -> None:
        """Keys that belong to another kind of source, where they differ from their defaults."""
        for key in keys:
            default = "" if key == "model" else type(self).model_fields[key].default
            if vars(self)[key] != default:
                raise ValueError(f"{key}: {reason}")


def _as_sources(value: Any) -> Any:
    return [value] if isinstance(value, Mapping | RewardSettings) else value


def _as_written(sources: tuple[RewardSettings, ...]) -> Any:
    written = [source.model_dump(mode="json") for source in sources]
    return written[0] if len(written) == 1 else written


def _check_sources(sources: tuple[RewardSettings, ...]) -> tuple[RewardSettings, ...]:
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two sources have the name '{name}'; give each a name of its own")
    if not any(source.weight for source in sources):
        raise ValueError("no source has a weight other than 0, so that nothing would be a reward")
    return sources


RewardSources = Annotated[
    tuple[RewardSettings, ...],
    BeforeValidator(_as_sources),
    AfterValidator(_check_sources),
    PlainSerializer(_as_written, return_type=Any),
]
"""One source, written as a section, or a list of them."""
