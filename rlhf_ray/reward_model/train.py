"""Training a reward model on human comparisons, and judging it on held-out ones."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.config.settings import PreferenceSettings, RewardModelConfig, RewardTrainingSettings
from rlhf_ray.data.preferences import PreferenceSet, load_preferences
from rlhf_ray.failures import BadInput
from rlhf_ray.models.loading import check_tokenizer_fits, read_model_facts
from rlhf_ray.models.reward_models import RewardEncoding, RewardModelCard, load_reward_tokenizer, weights_version
from rlhf_ray.ppo.inputs import check_top_layers
from rlhf_ray.randomness import batch_rows
from rlhf_ray.roles.reward_learner import EncodedPair, RewardLearner
from rlhf_ray.runtime.actor_group import ActorGroup
from rlhf_ray.runtime.cluster import RoleRequest
from rlhf_ray.runtime.learner_group import connected, start_learners
from rlhf_ray.tracking.display import Column
from rlhf_ray.tracking.report import plot_loss
from rlhf_ray.tracking.tracker import Tracker, check_folder, open_folder

COLUMNS = (
    Column("loss", "loss", ".4f", curve=True, better="lower"),
    Column("accuracy", "accuracy", ".3f", better="higher"),
    Column("margin/mean", "margin", "+.3f"),
    Column("throughput/pairs_per_s", "pairs/s", ".1f"),
    Column("time/step_s", "s/step", ".1f"),
)


@dataclass(frozen=True)
class EncodedSet:
    """Pairs as tokens, and what was left out or cut on the way.

    Attributes:
        num_cut: pairs of which a text was cut.
        num_too_long: pairs left out for a text that is too long.
        num_small_gap: pairs left out for their gap.
        num_bad: bad rows left out.
        digest: hash of the tokens and labels.
    """

    pairs: tuple[EncodedPair, ...]
    num_cut: int
    num_too_long: int
    num_small_gap: int
    num_bad: int
    digest: str


def run_reward_model(config: RewardModelConfig) -> None:
    """Everything `rlhf-ray train-rm` does.

    Raises:
        BadInput: before any actor starts.
        RoleFailure: a rank failed, died or did not answer.
    """
    check_folder(config)
    training = config.training
    facts = read_model_facts(config.model, "model")
    tokenizer = load_reward_tokenizer(config.model, "model")
    check_tokenizer_fits(tokenizer, facts, config.model, "model")
    check_top_layers(config.learner.trainable_top_layers, facts, "learner.trainable_top_layers")
    if training.max_length > facts.context_tokens:
        raise BadInput(
            "training.max_length", f"{training.max_length} tokens", f"at most {facts.context_tokens}, the model's limit"
        )
    encoding = RewardEncoding.for_tokenizer(tokenizer, training.max_length)
    pairs = encode_pairs(config.pairs, "pairs.path", tokenizer, encoding, training)
    held_out = (
        encode_pairs(config.held_out, "held_out.path", tokenizer, encoding, training) if config.held_out else None
    )
    steps = training.steps or training.epochs * math.ceil(len(pairs.pairs) / training.batch_size)
    request = RoleRequest("reward-learner", "learner", config.learner)
    with connected(config.cluster, request):
        folder = open_folder(config)
        title = f"reward model {config.run.name} · {config.model}"
        with Tracker(config, "reward_model", folder, title, steps, COLUMNS) as tracker:
            for name, each in (("pairs", pairs), ("held_out", held_out)):
                if each is not None:
                    _tell_what_was_left_out(tracker, name, each)
            tracker.phase("loading the model")
            group = start_learners(
                request,
                config.cluster,
                folder.logs,
                RewardLearner,
                lambda rank: (config.model, config.learner, training, rank, steps, config.run.seed),
            )
            _train(group, config, pairs, steps, tracker)
            evaluation: dict[str, float] = {}
            if held_out is not None:
                tracker.phase("judging the reward model")
                evaluation = {"accuracy": accuracy(group, held_out.pairs), "pairs": len(held_out.pairs)}
                tracker.display.message(
                    f"accuracy {evaluation['accuracy']:.3f} on {len(held_out.pairs)} held-out pairs"
                )
            tracker.phase("writing the reward model")
            group.call_all("export", str(folder.reward_model.absolute()))
            RewardModelCard(
                version=weights_version(folder.reward_model),
                base_model=config.model,
                max_length=encoding.max_length,
                append_eos=encoding.append_eos,
                chat_template=tokenizer.chat_template,
                training_data=pairs.digest,
                evaluation=evaluation,
            ).save(folder.reward_model)
            plot_loss(folder.metrics, folder.plot, f"{config.run.name} · {config.model}")
            tracker.finish(
                {
                    "name": config.run.name,
                    "steps": steps,
                    "reward_model": evaluation,
                    "pairs": len(pairs.pairs),
                    "wall_s": tracker.wall_s,
                }
            )


def encode_pairs(
    settings: PreferenceSettings, key: str, tokenizer: Any, encoding: RewardEncoding, training: RewardTrainingSettings
) -> EncodedSet:
    """Read comparisons and turn them into tokens.

    Raises:
        BadInput: unreadable or bad rows, or nothing left to train on.
    """
    read: PreferenceSet = load_preferences(settings, tokenizer, key)
    encoded: list[EncodedPair] = []
    num_cut = num_too_long = num_small_gap = 0
    digest = hashlib.blake2b(digest_size=16)
    for pair in read.pairs:
        if settings.min_gap is not None and (pair.gap is None or pair.gap < settings.min_gap):
            num_small_gap += 1
            continue
        (chosen, chosen_cut), (rejected, rejected_cut) = (
            encoding.encode(pair.prompt + response, tokenizer) for response in (pair.chosen, pair.rejected)
        )
        if chosen_cut or rejected_cut:
            if training.on_too_long == "fail":
                raise BadInput(
                    pair.place,
                    f"a text is longer than {encoding.max_length} tokens",
                    "a larger training.max_length, or training.on_too_long: truncate or skip",
                )
            if training.on_too_long == "skip":
                num_too_long += 1
                continue
            num_cut += 1
        encoded.append(EncodedPair(tuple(chosen), tuple(rejected), pair.chosen_probability, pair.margin, pair.weight))
        digest.update(repr(encoded[-1]).encode())
    if not encoded:
        raise BadInput(
            key, f"none of the {read.num_rows} rows of '{settings.path}' is left", "at least one usable pair"
        )
    return EncodedSet(tuple(encoded), num_cut, num_too_long, num_small_gap, read.num_skipped, digest.hexdigest())


def accuracy(group: ActorGroup, pairs: Sequence[EncodedPair]) -> float:
    """Share of pairs in which the preferred response has the higher score; ties count half.

    Pairs without a preferred response (label one half) are left out.
    """
    pending = []
    decided = [pair for pair in pairs if pair.chosen_probability != 0.5]
    # Every rank needs at least one pair: the forward pass is a collective.
    size = math.ceil(len(decided) / len(group))
    parts = [decided[start : start + size] or decided[:1] for start in range(0, size * len(group), size)]
    for rank, part in enumerate(parts):
        pending += group.submit(rank, "score_pairs", part)
    scores = [pair for answer in group.wait(pending) for pair in answer][: len(decided)]
    right = 0.0
    for pair, (chosen, rejected) in zip(decided, scores, strict=True):
        sign = 1.0 if pair.chosen_probability > 0.5 else -1.0
        right += 0.5 if chosen == rejected else float((chosen - rejected) * sign > 0)
    return right / len(decided)


def _train(group: ActorGroup, config: RewardModelConfig, data: EncodedSet, steps: int, tracker: Tracker) -> None:
    training = config.training
    for step in range(1, steps + 1):
        started = time.monotonic()
        rows = batch_rows(len(data.pairs), training.batch_size, config.run.seed, step - 1)
        pending = []
        for rank in range(len(group)):
            pending += group.submit(rank, "train_pairs", [data.pairs[row] for row in rows[rank :: len(group)]])
        report = group.wait(pending)[0]
        seconds = time.monotonic() - started
        tracker.step(
            {
                "step": step,
                "epoch": step * training.batch_size / len(data.pairs),
                "wall_s": tracker.wall_s,
                "loss": report.loss,
                "accuracy": report.accuracy,
                "margin/mean": report.margin_mean,
                "score/mean": report.score_mean,
                "score/std": report.score_std,
                "grad_norm": report.grad_norm,
                "lr": report.learning_rate,
                "throughput/pairs_per_s": len(rows) / seconds,
                "time/step_s": seconds,
            }
        )


def _tell_what_was_left_out(tracker: Tracker, name: str, data: EncodedSet) -> None:
    counts = {
        "cut": data.num_cut,
        "too_long": data.num_too_long,
        "small_gap": data.num_small_gap,
        "bad_rows": data.num_bad,
    }
    tracker.events.write("data_read", data=name, pairs=len(data.pairs), left_out=counts)
    told = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in counts.items() if count)
    tracker.display.message(f"{name}: {len(data.pairs)} pairs" + (f" ({told})" if told else ""))
