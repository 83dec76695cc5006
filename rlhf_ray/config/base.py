"""What all settings are made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# YAML 1.1 reads a bare `off` as false.
OffIsAWord = BeforeValidator(lambda value: "off" if value is False else value)


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
    env: dict[str, str] = Field(default_factory=dict, description="Environment variables of each process.")

    @property
    def concurrent_calls(self) -> int:
        """Calls that one process works on at the same time."""
        return 1

    @property
    def kept_block_bytes(self) -> int:
        """Blocks up to this size keep their pages when they are freed (glibc). Otherwise every large tensor's pages are
        given back and faulted in again: a quarter of a training step on a CPU."""
        return 4 << 30


DType = Literal["auto", "float32", "bfloat16"]
