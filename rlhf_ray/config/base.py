"""What all settings are made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# YAML 1.1 reads a bare `off` as false.
OffIsAWord = BeforeValidator(lambda value: "off" if value is False else value)


_SECRET_WORDS = {
    *("TOKEN", "TOKENS", "KEY", "APIKEY", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS")
}


def names_a_secret(variable: str) -> bool:
    """Whether an environment variable of this name holds a secret, and not the path of a file with one."""
    words = variable.upper().split("_")
    return bool(_SECRET_WORDS.intersection(words)) and words[-1] not in ("PATH", "FILE")


class Settings(BaseModel):
    """A section of a configuration file: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, coerce_numbers_to_str=True
    )


class ActorSettings(Settings):
    """How the processes of a role are placed."""

    replicas: PositiveInt = Field(1, description="Processes of this role. For a learner: data-parallel ranks.")
    threads: PositiveInt = Field(1, description="Compute threads of each process.")
    cpus: PositiveFloat = Field(
        0.25,
        description="Logical CPUs that Ray reserves for each process. Roles of a synchronous "
        "run take turns, so this may be lower than `threads`.",
    )
    gpus: NonNegativeFloat = Field(0.0, description="GPUs that Ray reserves for each process; 0 runs it on the CPU.")
    env: dict[str, str] = Field(
        default_factory=dict,
        description="Environment variables of each process. No secrets: the configuration is kept in the run's folder. "
        "Set those where Ray is started, or name a file.",
    )

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, env: dict[str, str]) -> dict[str, str]:
        for name in env:
            if names_a_secret(name):
                raise ValueError(
                    f"{name} is a secret, and the configuration is kept in the run's folder; set it in the environment "
                    "that Ray is started in, or name a file that holds it"
                )
        return env

    @property
    def concurrent_calls(self) -> int:
        """Calls that one process works on at the same time."""
        return 1

    @property
    def kept_block_bytes(self) -> int:
        """Blocks up to this size keep their pages when they are freed (glibc). Otherwise every large tensor's pages are
        given back and faulted in again: a quarter of a training step on a CPU."""
        return 4 << 30


def check_batch(size: int, key: str, replicas: int, learner: str) -> None:
    """See that every rank has something of a step.

    Raises:
        ValueError: it has not.
    """
    if size < replicas:
        raise ValueError(f"{key}: {size} for {replicas} ranks ({learner}.replicas); at least one for each")


def check_sharded(settings: ActorSettings) -> None:
    """What processes must be like that share the weights of one model.

    Raises:
        ValueError: they are not.
    """
    if settings.replicas < 2:
        raise ValueError(
            f"sharded: {settings.replicas} replica has nobody to share the weights with; at least 2 replicas, or false"
        )
    if settings.gpus not in (0, 1):
        raise ValueError(
            f"gpus: {settings.gpus:g} for one rank; a rank that shares the weights has one whole GPU, or 0 for the CPU"
        )


DType = Literal["auto", "float32", "bfloat16"]
