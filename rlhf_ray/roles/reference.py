"""The frozen model that the KL penalty is measured against."""

from __future__ import annotations

import numpy as np
import torch

from rlhf_ray.config.settings import ReferenceSettings
from rlhf_ray.models.loading import resolve_attention, resolve_dtype
from rlhf_ray.models.packing import RolloutRows
from rlhf_ray.models.token_models import load_policy_model
from rlhf_ray.models.trunk import column_of
from rlhf_ray.rollout import Rollout, TokenColumn, TrunkColumn


class Reference:
    """One replica of the reference model.

    Args:
        model: Hugging Face directory or hub id.
        temperature: of the sampling, so that both sides of the KL are the same kind of distribution.
        trained_layers: layers from the top that the policy trains, where it shares those below with this model.
    """

    def __init__(
        self, model: str, settings: ReferenceSettings, temperature: float, trained_layers: int | None = None
    ) -> None:
        on_gpu = settings.gpus > 0
        self._device = torch.device("cuda" if on_gpu else "cpu")
        self._micro_batch_tokens = settings.micro_batch_tokens
        with self._device:  # straight onto it, without a copy in host memory
            self._model = load_policy_model(
                model,
                dtype=resolve_dtype(settings.dtype, on_gpu),
                temperature=temperature,
                float32_logits=settings.float32_logits,
                attention=resolve_attention(settings.attention, on_gpu),
            ).eval()
        if trained_layers is not None:
            self._model.cut_above(trained_layers)

    @torch.inference_mode()
    def trunk(self, rollout: Rollout) -> TrunkColumn:
        """Hidden states of every token behind the layers that are never trained."""
        rows = RolloutRows([rollout])
        packs = rows.pack(range(len(rows)), self._micro_batch_tokens)
        states = [self._model.trunk_states(pack.to(self._device)).cpu() for pack in packs]
        order = torch.cat([pack.tokens for pack in packs]).argsort()
        return column_of(torch.cat(states)[order])

    @torch.inference_mode()
    def logprobs(self, rollout: Rollout, trunk: TrunkColumn | None = None) -> TokenColumn:
        """Log-probs of every response token.

        Args:
            trunk: of the rollout; computed again if empty.
        """
        rows = RolloutRows([rollout], [trunk])
        column = np.zeros(rows.num_columns, dtype=np.float32)
        for pack in rows.pack(range(len(rows)), self._micro_batch_tokens):
            column[pack.columns.numpy()] = self._model(pack.to(self._device)).cpu().numpy()
        return TokenColumn(column)
