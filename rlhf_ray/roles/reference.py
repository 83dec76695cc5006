"""The frozen model that the KL penalty is measured against."""

from __future__ import annotations

import torch

from rlhf_ray.config.settings import ReferenceSettings
from rlhf_ray.models.loading import resolve_attention, resolve_dtype
from rlhf_ray.models.packing import PackedBatch, RolloutRows
from rlhf_ray.models.token_models import PolicyModel, load_policy_model
from rlhf_ray.models.trunk import column_of
from rlhf_ray.roles.frozen_engine import FrozenEngine
from rlhf_ray.roles.learner import balanced_packs, token_column
from rlhf_ray.roles.rank_group import Rank
from rlhf_ray.rollout import Rollout, TokenColumn, TrunkColumn


class Reference:
    """One replica of the reference model, or one rank of a model that is spread over all of them.

    With a rank, every method is a collective: the ranks are asked for the same things in the same order, each of a
    rollout of its own.

    Args:
        model: Hugging Face directory or hub id.
        temperature: of the sampling, so that both sides of the KL are the same kind of distribution.
        trained_layers: layers from the top that the policy trains, where it shares those below with this model.
        rank: this process's place among those that share the weights; None where it holds all of them.
    """

    def __init__(
        self,
        model: str,
        settings: ReferenceSettings,
        temperature: float,
        trained_layers: int | None = None,
        rank: Rank | None = None,
    ) -> None:
        on_gpu = settings.gpus > 0
        dtype = resolve_dtype(settings.dtype, on_gpu)
        self._micro_batch_tokens = settings.micro_batch_tokens

        def build() -> PolicyModel:
            self._model = load_policy_model(
                model,
                dtype=dtype,
                temperature=temperature,
                float32_logits=settings.float32_logits,
                attention=resolve_attention(settings.attention),
            )
            if trained_layers is not None:
                self._model.cut_above(trained_layers)
            return self._model

        self._engine = FrozenEngine(build, rank, on_gpu, dtype)

    def trunk(self, rollout: Rollout) -> TrunkColumn:
        """Hidden states of every token behind the layers that are never trained."""
        engine, rows = self._engine, RolloutRows([rollout])

        def states_of(pack: PackedBatch) -> torch.Tensor:
            return self._model.trunk_states(pack.to(engine.device), to_the_end=engine.is_sharded).cpu()

        packs = balanced_packs(rows, range(len(rows)), self._micro_batch_tokens, engine)
        states = engine.forward_each(packs, states_of)
        order = torch.cat([pack.tokens for pack in packs]).argsort()
        return column_of(torch.cat(states)[order])

    def logprobs(self, rollout: Rollout, trunk: TrunkColumn | None = None) -> TokenColumn:
        """Log-probs of every response token.

        Args:
            trunk: of the rollout; computed again if empty.
        """
        return token_column(self._engine, rollout, trunk, self._micro_batch_tokens, self._engine.module)
