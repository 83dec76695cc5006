"""The learner of a reward model: Bradley-Terry on pairs, any sequence-classification backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_ray.config.reward_model import RewardTrainingSettings
from rlhf_ray.config.settings import LearnerSettings
from rlhf_ray.models.adapters import add_adapters, persistent_buffers
from rlhf_ray.models.loading import (
    resolve_attention,
    resolve_dtype,
    resolve_padded_attention,
    train_only_top_layers,
)
from rlhf_ray.models.token_models import gathered
from rlhf_ray.randomness import keyed_seed
from rlhf_ray.reward.core.card import MemberLayout
from rlhf_ray.reward.core.loading import head_hash, head_of, load_reward_network, load_reward_tokenizer
from rlhf_ray.reward.core.network import RewardNetwork, takes_packed_rows
from rlhf_ray.reward.train.pairs import EncodedPair
from rlhf_ray.reward.train.preference import bradley_terry_loss, pair_accuracy
from rlhf_ray.roles.deepspeed_engine import DeepSpeedEngine
from rlhf_ray.roles.learner import Meter, checkpoint_folder
from rlhf_ray.roles.rank_group import Rank


@dataclass(frozen=True)
class PairReport:
    """One step, over all ranks. Accuracy, margin and score are those of the preference, averaged over the heads.

    Attributes:
        tokens: of the pairs' texts.
        computed_tokens: that went through the model, padding included.
    """

    loss: float
    accuracy: float
    margin_mean: float
    score_mean: float
    score_std: float
    tokens: int
    computed_tokens: int
    grad_norm: float
    learning_rate: float


class RewardLearner:
    """One rank of the reward model's learner. Every method is a collective of all ranks.

    Args:
        model: backbone.
        settings: how it is trained.
        training: the loss, the backbone's dropout and adapters.
        layout: attributes and heads.
        rank: this process in its group.
        total_steps: optimizer steps of the whole run.
        seed: keys the head's first weights, adapters and dropout.
    """

    def __init__(
        self,
        model: str,
        settings: LearnerSettings,
        training: RewardTrainingSettings,
        layout: MemberLayout,
        rank: Rank,
        total_steps: int,
        seed: int,
    ) -> None:
        self._training = training
        self._layout = layout
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
                attention=resolve_padded_attention("auto", on_gpu),
                num_labels=layout.num_labels,
                new_head=True,
            )
            start_head_small(network)
            train_only_top_layers(network, settings.trainable_top_layers)
            packed = takes_packed_rows(network)
            wanted = settings.attention
            network.set_attn_implementation(
                resolve_attention(wanted) if packed else resolve_padded_attention(wanted, on_gpu)
            )
            if training.lora is not None:
                add_adapters(network, training.lora, "training.lora.target_modules", seed)
                head_of(network).requires_grad_(True)
            return RewardNetwork(network, self._tokenizer.pad_token_id, packed)

        self._computed_tokens = 0
        self._engine = DeepSpeedEngine(build, settings, rank, dtype, total_steps)
        self._seed = seed

    def train_pairs(self, pairs: Sequence[EncodedPair]) -> PairReport:
        """One optimizer step on this rank's pairs: the loss summed over the attributes that a pair has, and averaged
        over pairs and heads. Every label weighs the same; averaged over the pairs that have it, an attribute's only
        label in a batch would weigh as much as all preferences together."""
        engine, training, heads = self._engine, self._training, self._layout.heads
        torch.manual_seed(keyed_seed(self._seed, "dropout", engine.steps_done, engine.rank.rank))
        attributes = range(len(self._layout.attributes))
        own = torch.tensor([sum(pair.weight for pair in pairs), len(pairs)], dtype=torch.float64)
        total_weight, count = engine.all_reduce(own).tolist()
        meter = Meter(engine, ("loss", "accuracy", "margin", "score", "score_square", "tokens"))
        self._computed_tokens = 0

        def loss(group: list[EncodedPair], counts: bool) -> torch.Tensor:
            chosen, rejected = self._pair_logits(group)

            def column(values: list[float]) -> torch.Tensor:
                return torch.tensor(values, dtype=torch.float32, device=chosen.device)

            members = torch.tensor([pair.member_weights for pair in group], device=chosen.device, dtype=torch.float32)
            total = chosen.new_zeros(())
            for attribute in attributes:
                labels = [pair.probabilities[attribute] for pair in group]
                weight = column([0.0 if p is None else pair.weight for p, pair in zip(labels, group, strict=True)])
                margins = [pair.margin or 0.0 for pair in group] if attribute == 0 else []
                for head in range(heads):
                    summed = bradley_terry_loss(
                        chosen[:, attribute, head],
                        rejected[:, attribute, head],
                        chosen_probability=column([0.5 if p is None else p for p in labels]),
                        margin=column(margins) if any(margins) else None,
                        weight=weight * members[:, head],
                        label_smoothing=training.label_smoothing,
                        centering=training.centering,
                    )
                    total = total + summed / (total_weight or 1.0) / heads
            if counts:
                mean_chosen, mean_rejected = (side[:, 0].detach().mean(-1) for side in (chosen, rejected))
                scores = torch.cat([mean_chosen, mean_rejected])
                meter.add(
                    loss=total.detach(),
                    accuracy=pair_accuracy(mean_chosen, mean_rejected).sum(),
                    margin=(mean_chosen - mean_rejected).sum(),
                    score=scores.sum(),
                    score_square=scores.square().sum(),
                    tokens=sum(_num_tokens(pair) for pair in group),
                )
            return total

        report = engine.optimizer_step(self._groups(pairs), loss)
        [computed_tokens] = engine.all_reduce(torch.tensor([self._computed_tokens], dtype=torch.float64)).tolist()
        sums = meter.total()
        mean = sums["score"] / (2 * count)
        return PairReport(
            loss=sums["loss"],
            accuracy=sums["accuracy"] / count,
            margin_mean=sums["margin"] / count,
            score_mean=mean,
            score_std=max(sums["score_square"] / (2 * count) - mean**2, 0.0) ** 0.5,
            tokens=int(sums["tokens"]),
            computed_tokens=int(computed_tokens),
            grad_norm=report.grad_norm,
            learning_rate=report.learning_rate,
        )

    def score_tokens(self, texts: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """`[n, labels]` logits of this rank's texts, in their order."""
        order = sorted(range(len(texts)), key=lambda index: (-len(texts[index]), index))
        batches: list[list[int]] = []
        for index in order:
            width = len(texts[batches[-1][0]]) if batches else 0
            if not batches or (len(batches[-1]) + 1) * width > self._micro_batch_tokens:
                batches.append([])
            batches[-1].append(index)
        scored = self._engine.forward_each(batches, lambda rows: self._engine.module([texts[row] for row in rows])[0])
        result = np.zeros((len(texts), self._layout.num_labels))
        for rows, logits in zip(batches, scored, strict=True):
            result[rows] = logits.double().cpu().numpy()
        return result

    def save_checkpoint(self, folder: str) -> None:
        self._engine.save_checkpoint(checkpoint_folder(folder, "reward_model"))

    def load_checkpoint(self, folder: str) -> None:
        self._engine.load_checkpoint(checkpoint_folder(folder, "reward_model"))

    def export(self, folder: str) -> str:
        """The reward model as a Hugging Face directory with its tokenizer, adapters merged, written by rank 0.

        Returns:
            Hash of the head's weights; empty on the other ranks.
        """
        weights = self._engine.full_weights("network.")
        state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights}
        if self._engine.rank.rank != 0:
            return ""
        network = self._engine.unwrapped.network
        network.save_pretrained(folder, state_dict=state | persistent_buffers(network))
        self._tokenizer.save_pretrained(folder)
        return head_hash(state)

    def _pair_logits(self, pairs: Sequence[EncodedPair]) -> tuple[torch.Tensor, torch.Tensor]:
        """`[n, A, heads]` of the chosen and of the rejected texts, in one pass."""
        logits, num_tokens = self._engine.module([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs])
        self._computed_tokens += num_tokens
        chosen, rejected = logits.view(2, len(pairs), -1, self._layout.heads)
        return chosen, rejected

    def _groups(self, pairs: Sequence[EncodedPair]) -> list[list[EncodedPair]]:
        """Pairs of like length together, at most `micro_batch_tokens` of their texts."""
        groups: list[list[EncodedPair]] = []
        tokens = 0
        for pair in sorted(pairs, key=lambda pair: -_num_tokens(pair)):
            if not groups or tokens + _num_tokens(pair) > self._micro_batch_tokens:
                groups.append([])
                tokens = 0
            groups[-1].append(pair)
            tokens += _num_tokens(pair)
        return groups


def start_head_small(network: Any) -> None:
    """Scale the new head so that first scores are near 0 and the first step learns from labels, not noise."""
    parameters = list(head_of(network).parameters())
    with gathered(parameters), torch.no_grad():
        for parameter in parameters:
            parameter.mul_(0.1)


def _num_tokens(pair: EncodedPair) -> int:
    return len(pair.chosen) + len(pair.rejected)
