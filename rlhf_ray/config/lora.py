"""The settings of low-rank adapters."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf_ray.config.base import Fraction, PositiveInt, Settings


class LoraSettings(Settings):
    """Low-rank adapters (Hu et al. 2021): of W + scale · B A only B and A are trained."""

    rank: PositiveInt = Field(16, description="Rank of the adapters.")
    alpha: PositiveInt = Field(32, description="Adapters are scaled by `alpha / rank`.")
    rslora: bool = Field(
        False,
        description="Scale by `alpha / √rank` instead (Kalajdzievski 2023): larger ranks do not learn more slowly.",
    )
    dropout: Fraction = Field(0.0, description="Dropout in front of the adapters; of reward models only.")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="Linear layers that get an adapter, by the end of their names, such as `[q_proj, v_proj]`; "
        "`all-linear`: all but the output projection or head.",
        min_length=1,
    )
