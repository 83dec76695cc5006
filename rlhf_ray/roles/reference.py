"""The frozen model that the KL penalty is measured against."""

from __future__ import annotations

import numpy as np
import torch

from rlhf_ray.config.settings import ReferenceSettings
from rlhf_ray.models.loading import resolve_attention, resolve_dtype
from rlhf_ray.models.packing import RolloutRows
from rlhf_ray.models.token_models import load_policy_model
from rlhf_ray.rollout import Rollout, TokenColumn


class Reference:
    """One replica of the reference model.

    Args:
        model: Hugging Face directory or hub id.
        temperature: of the sampling, so that both sides of the KL are the same kind of distribution.
    """

    def __init__(self, model: str, settings: ReferenceSettings, temperature: float) -> None:
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

    @torch.inference_mode()
    def logprobs(self, rollout: Rollout) -> TokenColumn:
        """Log-probs of every response token."""
        rows = RolloutRows([rollout])
        column = np.zeros(rows.num_columns, dtype=np.float32)
        for pack in rows.pack(range(len(rows)), self._micro_batch_tokens):
            column[pack.columns.numpy()] = self._model(pack.to(self._device)).cpu().numpy()
        return TokenColumn(column)
