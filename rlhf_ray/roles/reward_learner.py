"""The learner of a reward model: Bradley-Terry on pairs, any sequence-classification backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.algorithms.preference import bradley_terry_loss, pair_accuracy
from rlhf_ray.config.settings import LearnerSettings, RewardTrainingSettings
from rlhf_ray.models.loading import resolve_dtype, resolve_padded_attention, train_only_top_layers
from rlhf_ray.models.reward_models import load_reward_network, load_reward_tokenizer, pad_texts
from rlhf_ray.models.token_models import gathered
from rlhf_ray.roles.deepspeed_engine import DeepSpeedEngine, Rank
from rlhf_ray.roles.learner import Meter, checkpoint_folder


@dataclass(frozen=True)
class EncodedPair:
    """One comparison as tokens.

    Attributes:
        chosen, rejected: token ids of the whole texts.
        chosen_probability: soft label.
        margin: at least this much apart, or None.
        weight: in the loss.
    """

    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    chosen_probability: float
    margin: float | None
    weight: float


@dataclass(frozen=True)
class PairReport:
    """One step, over all ranks."""

    loss: float
    accuracy: float
    margin_mean: float
    score_mean: float
    score_std: float
    grad_norm: float
    learning_rate: float


class RewardLearner:
    """One rank of the reward model's learner. Every method is a collective of all ranks.

    Args:
        model: backbone.
        settings: how it is trained.
        training: the loss and the backbone's dropout.
        rank: this process in its group.
        total_steps: optimizer steps of the whole run.
        seed: keys the head's first weights and dropout.
    """

    def __init__(
        self,
        model: str,
        settings: LearnerSettings,
        training: RewardTrainingSettings,
        rank: Rank,
        total_steps: int,
        seed: int,
    ) -> None:
        self._training = training
        self._micro_batch_tokens = settings.micro_batch_tokens
        self._tokenizer = load_reward_tokenizer(model, "model")
        on_gpu = settings.gpus > 0
        dtype = resolve_dtype(settings.dtype, on_gpu)

        def build() -> Any:
            torch.manual_seed(seed)
            network = load_reward_network(
                model,
                dtype=dtype,
                pad_token_id=self._tokenizer.pad_token_id,
                dropout=training.dropout,
                attention=resolve_padded_attention(settings.attention, on_gpu),
            )
            start_head_small(network)
            train_only_top_layers(network, settings.trainable_top_layers)
            return network

        self._engine = DeepSpeedEngine(build, settings, rank, dtype, total_steps)
        torch.manual_seed(seed + rank.rank)

    def train_pairs(self, pairs: Sequence[EncodedPair]) -> PairReport:
        """One optimizer step on this rank's pairs."""
        engine, training = self._engine, self._training
        own = torch.tensor([sum(pair.weight for pair in pairs), len(pairs)], dtype=torch.float64)
        total_weight, count = engine.all_reduce(own).tolist()
        meter = Meter(("loss", "accuracy", "margin", "score", "score_square"))

        def loss(group: list[EncodedPair], counts: bool) -> torch.Tensor:
            scores = self._scores([pair.chosen for pair in group] + [pair.rejected for pair in group])
            chosen, rejected = scores.chunk(2)

            def column(values: list[float]) -> torch.Tensor:
                return torch.tensor(values, dtype=torch.float32, device=scores.device)

            margins = [pair.margin or 0.0 for pair in group]
            total = bradley_terry_loss(
                chosen,
                rejected,
                chosen_probability=column([pair.chosen_probability for pair in group]),
                margin=column(margins) if any(margins) else None,
                weight=column([pair.weight for pair in group]),
                label_smoothing=training.label_smoothing,
                centering=training.centering,
            )
            if counts:
                detached = scores.detach()
                meter.add(
                    loss=total.detach(),
                    accuracy=pair_accuracy(chosen.detach(), rejected.detach()).sum(),
                    margin=(chosen - rejected).detach().sum(),
                    score=detached.sum(),
                    score_square=detached.square().sum(),
                )
            return total / (total_weight or 1.0)

        report = engine.optimizer_step(self._groups(pairs), loss)
        sums = meter.total(engine)
        mean = sums["score"] / (2 * count)
        return PairReport(
            loss=sums["loss"] / (total_weight or 1.0),
            accuracy=sums["accuracy"] / count,
            margin_mean=sums["margin"] / count,
            score_mean=mean,
            score_std=max(sums["score_square"] / (2 * count) - mean**2, 0.0) ** 0.5,
            grad_norm=report.grad_norm,
            learning_rate=report.learning_rate,
        )

    def score_pairs(self, pairs: Sequence[EncodedPair]) -> list[tuple[float, float]]:
        """Scores of chosen and rejected of this rank's pairs, in their order."""
        order = sorted(range(len(pairs)), key=lambda index: (-_width(pairs[index]), index))
        groups = self._groups([pairs[index] for index in order])
        scored = self._engine.forward_each(
            groups, lambda group: self._scores([pair.chosen for pair in group] + [pair.rejected for pair in group])
        )
        flat = [
            (chosen, rejected)
            for scores in scored
            for chosen, rejected in zip(*(half.tolist() for half in scores.chunk(2)), strict=True)
        ]
        result: list[tuple[float, float]] = [(0.0, 0.0)] * len(pairs)
        for index, scores_of_pair in zip(order, flat, strict=True):
            result[index] = scores_of_pair
        return result

    def save_checkpoint(self, folder: str) -> None:
        self._engine.save_checkpoint(checkpoint_folder(folder, "reward_model"))

    def load_checkpoint(self, folder: str) -> None:
        self._engine.load_checkpoint(checkpoint_folder(folder, "reward_model"))

    def export(self, folder: str) -> None:
        """The reward model as a Hugging Face directory with its tokenizer, written by rank 0."""
        self._engine.save_pretrained(Path(folder), self._engine.unwrapped, "")
        if self._engine.rank.rank == 0:
            self._tokenizer.save_pretrained(folder)

    def _scores(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """`[n]` float32."""
        batch = pad_texts(texts, self._tokenizer.pad_token_id)
        outputs = self._engine.module(**{name: tensor.to(self._engine.device) for name, tensor in batch.items()})
        return outputs.logits[:, 0].float()

    def _groups(self, pairs: Sequence[EncodedPair]) -> list[list[EncodedPair]]:
        """Pairs of like length together, at most `micro_batch_tokens` with padding."""
        groups: list[list[EncodedPair]] = []
        for pair in sorted(pairs, key=lambda pair: -_width(pair)):
            width = _width(groups[-1][0]) if groups else 0
            if not groups or 2 * (len(groups[-1]) + 1) * width > self._micro_batch_tokens:
                groups.append([])
            groups[-1].append(pair)
        return groups


def start_head_small(network: Any) -> None:
    """Scale the new head so that first scores are near 0 and the first step learns from labels, not noise."""
    head = network.classifier if hasattr(network, "classifier") else network.score
    parameters = list(head.parameters())
    with gathered(parameters), torch.no_grad():
        for parameter in parameters:
            parameter.mul_(0.1)


def _width(pair: EncodedPair) -> int:
    return max(len(pair.chosen), len(pair.rejected))
