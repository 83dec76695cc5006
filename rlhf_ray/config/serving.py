"""Settings of the reward service."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from rlhf_ray.config.base import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Settings
from rlhf_ray.config.reward import ScorerSettings
from rlhf_ray.config.settings import RunConfig

ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
CallerName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
SHORTEST_TOKEN = 16


def _token(token: str) -> str:
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        # Said without the token: it ends up on terminals and in logs.
        raise ValueError(f"a token of {len(token)} characters, or with others than printable ASCII")
    return token


Token = Annotated[str, AfterValidator(_token)]


class ModelSettings(Settings):
    """One reward model of the service; its key is its name."""

    path: str = Field(description="Directory of the reward model.")
    share: Fraction | None = Field(
        None,
        description="Share of the requests that name no model. One model may leave it empty and gets what the others "
        "leave; a canary has a small share.",
    )
    shadow: bool = Field(
        False,
        description="A candidate that scores live traffic unseen: its scores are compared and never answered, unless "
        "a request names it.",
    )


class ServedModelSettings(ModelSettings):
    """A reward model with its name."""

    name: str = Field(description="What requests call it, and what metrics and reports say.")


class ServedScorerSettings(ScorerSettings):
    """How a replica of the service scores."""

    replicas: PositiveInt = Field(
        1, description="Always 1: `scaling.min_replicas` and `scaling.max_replicas` say how many replicas there are."
    )
    cpus: PositiveFloat = Field(1.0, description="Logical CPUs that Ray reserves for each replica.")
    on_too_long: Literal["fail", "truncate"] = Field(
        "truncate",
        description="A text longer than the model takes is cut at the front, flagged in the answer and counted; or is "
        "refused. Requests that say themselves what is to happen (vLLM's, TEI's) are taken at their word.",
    )
    require_release: bool = Field(True, description="Serve no model that the release gate refused.")

    @model_validator(mode="after")
    def _replicas_are_scaled(self) -> ServedScorerSettings:
        if self.replicas != 1:
            raise ValueError("replicas of a service are set by scaling.min_replicas and scaling.max_replicas")
        return self


class CallerSettings(Settings):
    """One caller of the service; its key in `endpoint.token_file` is its name."""

    tokens: Annotated[tuple[Token, ...], Field(min_length=1)] = Field(
        description="Its bearer tokens; each is good. `serve-rm` itself uses the first one of the first caller."
    )
    max_texts: PositiveInt | None = Field(
        None,
        description="Texts that it may have under way in a replica; what goes beyond is refused with 429 and "
        "`Retry-After`. A request counts as one text until it is read. Empty: no limit of its own.",
    )


class EndpointSettings(Settings):
    """Where the service listens, and who may ask it."""

    host: str = Field(
        "127.0.0.1", description="Address to listen at. Beyond loopback a token is needed, or nothing starts."
    )
    port: Annotated[int, Field(ge=1, le=65535)] = Field(8000, description="Port to listen at.")
    token_file: str | None = Field(
        None,
        description="File with the bearer token on one line, or YAML or JSON with the tokens and the limit of each "
        "caller by name (see serving.md); read again when it changes. Without it the token is read from the "
        "environment variable `RLHF_RAY_TOKEN`. Requests bring it as `Authorization: Bearer`, or as the password in "
        "the URL.",
    )
    start_timeout_s: PositiveFloat = Field(300.0, description="How long the service may take until it scores.")
    drain_timeout_s: PositiveFloat = Field(
        20.0, description="How long requests that are under way may take when a replica stops."
    )


class BatchingSettings(Settings):
    """How texts of several requests share a forward pass."""

    max_tokens: PositiveInt = Field(2048, description="Tokens of one batch. A single longer text has one of its own.")
    max_texts: PositiveInt = Field(64, description="Texts of one batch.")
    wait_ms: NonNegativeFloat = Field(
        3.0, description="How long an idle replica waits for more texts before it scores what it has."
    )


class LimitSettings(Settings):
    """What one request may ask for, and how many may wait."""

    max_texts: PositiveInt = Field(512, description="Texts of one request; more is refused with 413.")
    max_tokens: PositiveInt = Field(131072, description="Tokens of one request, after cutting; more is refused.")
    max_body_bytes: PositiveInt = Field(8 << 20, description="Bytes of a request's body; more is refused unread.")
    max_held_bytes: PositiveInt = Field(
        64 << 20,
        description="Bytes of the bodies of all requests that wait in a replica; more is refused as overload.",
    )
    body_timeout_s: PositiveFloat = Field(
        10.0, description="How long a request's body may take to arrive; then it is refused with 504."
    )
    max_queued_requests: PositiveInt = Field(
        256,
        description="Requests that may wait in a replica; the next is refused unread with 503 (429 on the paths of "
        "Text Embeddings Inference) and `Retry-After`.",
    )
    deadline_s: PositiveFloat = Field(
        60.0, description="How long a request may take; then it is refused with 504 and leaves the queue."
    )
    retry_after_s: PositiveInt = Field(1, description="What `Retry-After` says on overload.")

    @model_validator(mode="after")
    def _one_body_has_room(self) -> LimitSettings:
        if self.max_held_bytes < self.max_body_bytes:
            raise ValueError(
                f"max_held_bytes ({self.max_held_bytes}) must not be below max_body_bytes ({self.max_body_bytes})"
            )
        return self


class ScalingSettings(Settings):
    """How many replicas."""

    min_replicas: PositiveInt = Field(1, description="Replicas at rest.")
    max_replicas: PositiveInt = Field(1, description="Replicas under load.")
    target_ongoing_requests: PositiveFloat = Field(
        32.0, description="Requests in a replica above which another is started."
    )

    @model_validator(mode="after")
    def _ordered(self) -> ScalingSettings:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) must not be below min_replicas ({self.min_replicas})")
        return self


class CandidateSettings(Settings):
    """When a canary or shadow is rolled back automatically. Each rule acts only after `min_texts`."""

    min_texts: PositiveInt = Field(500, description="Texts given to it before any rule acts.")
    max_sign_flip_rate: Fraction = Field(
        0.2, description="Most pairs of texts that a shadow may order otherwise than the live model."
    )
    min_kendall_tau: Annotated[float, Field(ge=-1, le=1)] = Field(
        0.5, description="Least rank correlation (Kendall's τ-b) between a shadow's and the live model's scores."
    )
    max_score_shift: PositiveFloat = Field(
        2.0, description="Most that a candidate's mean score may lie off, in standard deviations of the live scores."
    )
    max_failure_rate: Fraction = Field(
        0.01, description="Share of texts that it may fail to score, beyond the live model's."
    )
    max_latency_ratio: PositiveFloat = Field(
        3.0, description="Most compute time a token that it may take, as a multiple of the live model's."
    )
    shadow_share: Fraction = Field(1.0, description="Share of the texts that the shadow scores as well.")


class DriftSettings(Settings):
    """How live traffic is compared with what the model was trained on."""

    window_texts: PositiveInt = Field(2000, description="Latest texts that are compared.")
    min_texts: PositiveInt = Field(500, description="Texts before anything is said.")
    false_alarm_rate: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.001, description="How often a comparison may raise an alarm where nothing has changed."
    )

    @model_validator(mode="after")
    def _a_window_is_enough(self) -> DriftSettings:
        if self.min_texts > self.window_texts:
            raise ValueError(f"min_texts ({self.min_texts}) must not be above window_texts ({self.window_texts})")
        return self


class AuditSettings(Settings):
    """The log from which any score can be replayed."""

    enabled: bool = Field(False, description="Write the log.")
    folder: str | None = Field(None, description="Where, on each replica's node; empty: `audit` in the run's folder.")
    texts: Literal["hash", "full"] = Field(
        "hash", description="What is kept of a text: its hash, or the token ids as they were scored."
    )
    key_file: str | None = Field(
        None,
        description="File with the key of all hashes. Without one anybody who has the log can rewrite it unseen, and "
        "see whether a text that they guess was scored.",
    )
    max_bytes: PositiveInt = Field(64 << 20, description="Size at which a file is closed and the next begun.")
    keep_files: NonNegativeInt = Field(0, description="Closed files to keep, the oldest go first; 0 keeps all.")


class ServiceSettings(Settings):
    """Everything of the service but its models: to change them restarts nothing."""

    scorer: ServedScorerSettings = Field(default_factory=ServedScorerSettings, description="How texts are scored.")
    endpoint: EndpointSettings = Field(default_factory=EndpointSettings, description="Where and to whom.")
    batching: BatchingSettings = Field(default_factory=BatchingSettings, description="How requests share batches.")
    limits: LimitSettings = Field(default_factory=LimitSettings, description="What is refused.")
    scaling: ScalingSettings = Field(default_factory=ScalingSettings, description="How many replicas.")
    candidates: CandidateSettings = Field(
        default_factory=CandidateSettings, description="When canaries and shadows are rolled back."
    )
    drift: DriftSettings = Field(default_factory=DriftSettings, description="Comparison with the training data.")
    audit: AuditSettings = Field(default_factory=AuditSettings, description="The log of scores.")


class ServingConfig(ServiceSettings, RunConfig):
    """`rlhf-ray serve-rm`: reward models as a service."""

    models: dict[ModelName, ModelSettings] = Field(
        description="The reward models of the service, by the name that requests call them.", min_length=1
    )

    @property
    def served(self) -> tuple[ServedModelSettings, ...]:
        """The models with their names."""
        return tuple(ServedModelSettings(name=name, **model.model_dump()) for name, model in self.models.items())

    @model_validator(mode="after")
    def _models_share_the_traffic(self) -> ServingConfig:
        check_shares(self.served)
        return self


def check_shares(models: Sequence[ServedModelSettings]) -> None:
    """See that every request has a model. No models at all are left to whoever needs one.

    Raises:
        ValueError: some would have none, or two models have one name.
    """
    live = [model for model in models if not model.shadow]
    rest = [model.name for model in live if model.share is None]
    total = sum(model.share or 0.0 for model in live)
    names = [model.name for model in models]
    if models and not live:
        raise ValueError("models: all are shadows; one must answer")
    if len(set(names)) < len(names):
        raise ValueError(f"models: two have one name, of {', '.join(names)}")
    if len(rest) > 1:
        raise ValueError(f"models: {', '.join(rest)} have no share; at most one may take what the others leave")
    if total > 1 + 1e-9 or (live and not rest and abs(total - 1) > 1e-9):
        raise ValueError(f"models: the shares of the live models add up to {total:g}, not to 1")
