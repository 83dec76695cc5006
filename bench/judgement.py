"""Does the judgement of a reward model say what is true? `python -m bench.judgement`

Comparisons and models of which everything is known (`tests/synthetic.py`), judged as users judge by default, over
seeds. Sound models should be released: perfect ones, perfect ones in another unit, and ones that see a part of the
quality only, with one, three and sixteen votes a pair and with raters who are more and less sure. Models and data with
a planted fault should be refused: power is reported against the size of the fault. Intervals should cover the truth as
often as they say. Nothing is trained and no engine runs: two minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from bench.results import Report, Result
from rlhf_ray.randomness import keyed_generator
from rlhf_ray.reward.judge.best_of_n import best_of_n_curve
from rlhf_ray.reward.judge.calibration import calibration
from rlhf_ray.reward.judge.groups import Groups
from rlhf_ray.reward.judge.label_noise import rater_ceiling
from tests.synthetic import (
    PAIRS_PER_PROMPT,
    Model,
    Responses,
    flipped,
    in_units_of,
    judged,
    length_only,
    partly_blind,
    paying_for,
    perfect,
    uneven,
    unsure,
)

PROMPTS = 100
SOUND: dict[str, Model] = {
    "perfect": perfect,
    "perfect × 0.02": unsure,
    "perfect × 200": in_units_of(0.005),
    "partly blind": partly_blind,
}
SURE = {"sure raters": 2.0, "unsure raters": 1.0}
REPETITIONS = 500


def refused(
    model: Model, seeds: int, *, prompts: int = PROMPTS, spread: float = 2.0, votes: int = 1, leaked: float = 0.0
) -> float:
    """Share of the seeds."""
    draws = (Responses.draw(seed, prompts, spread=spread, votes=votes) for seed in range(seeds))
    return float(np.mean([not judged(responses, model, leaked).verdict.released for responses in draws]))


def false_refusals(seeds: int) -> Iterator[Result]:
    """Of sound models, each kind and all together."""
    shares = []
    for raters, spread in SURE.items():
        for votes in (1, 3, 16):
            for name, model in SOUND.items():
                shares.append(refused(model, seeds, spread=spread, votes=votes))
                yield Result(f"refused: {name}, {raters}, votes {votes}", shares[-1], target="<= 0.05")
    yield Result("sound models refused", float(np.mean(shares)), target="<= 0.05")
    for raters, spread in SURE.items():
        for prompts in (50, 70):
            name = f"refused: perfect, {raters}, votes 1, {prompts * PAIRS_PER_PROMPT} pairs"
            yield Result(name, refused(perfect, seeds, prompts=prompts, spread=spread))


def power(seeds: int) -> Iterator[Result]:
    """Share of the seeds in which a fault is refused, by its size."""
    yield Result("flipped labels", refused(flipped, seeds), target=">= 1")
    yield Result("length only", refused(length_only, seeds), target=">= 1")
    for share in (0.2, 0.4, 0.6, 0.8):
        for raters, spread in SURE.items():
            target = ">= 0.95" if share >= 0.6 else None
            model = paying_for("lengths", share)
            yield Result(f"overpaid length {share:g}, {raters}", refused(model, seeds, spread=spread), target=target)
    for factor in (1.5, 2.0, 3.0, 4.0):
        for raters, spread in SURE.items():
            target = ">= 0.95" if factor >= 3 else None
            name = f"scores × {factor:g} and ÷ {factor:g}, {raters}"
            yield Result(name, refused(uneven(factor), seeds, spread=spread), target=target)
    for leaked in (0.0, 0.002, 0.01, 0.1):
        target = ">= 1" if leaked else "<= 0.05"
        yield Result(f"leaked pairs {leaked:g}", refused(perfect, seeds, leaked=leaked), target=target)


def said(seeds: int) -> Iterator[Result]:
    """Figures of perfect models beside the truth, means over seeds."""
    for votes in (1, 3, 16):
        found = [judged(Responses.draw(seed, PROMPTS, votes=votes), perfect).evaluation for seed in range(seeds)]
        yield Result(f"temperature, votes {votes}", float(np.mean([each.temperature.temperature for each in found])))
        yield Result(
            f"|calibration excess|, votes {votes}",
            abs(float(np.mean([each.calibration.excess.value for each in found]))),
            target="<= 0.01",
        )
        marks = [each.overpayment for each in found[0].formats if each.name == "exclamation marks"]
        yield Result(f"overpaid marks, one seed, votes {votes}", marks[0].share.value or 0.0)
    blurred = [judged(Responses.draw(seed, PROMPTS), unsure).evaluation.calibration.ece for seed in range(seeds)]
    yield Result("calibration error of perfect × 0.02", float(np.mean(blurred)), target=">= 0.2")
    for votes in (2, 3, 5, 16):
        errors = []
        for seed in range(seeds):
            responses = Responses.draw(seed, PROMPTS, votes=votes)
            pairs, _ = responses.pairs()
            differences = responses.quality[:, :, None] - responses.quality[:, None, :]
            # The model that knows everything is right in σ(|Δ|) of the votes on a pair.
            truth = float(expit(np.abs(differences[:, *np.triu_indices(differences.shape[1], 1)])).mean())
            errors.append((rater_ceiling(pairs).accuracy or 0.0) - truth)
        yield Result(f"|ceiling − truth|, votes {votes}", abs(float(np.mean(errors))), target="<= 0.01")


def coverage() -> Iterator[Result]:
    """How often 95 % intervals hold the truth; the target is 92 to 98 %, as two results each."""
    cases = {
        "10 groups of 20": (10, 20, 1.0, False),
        "10 unequal groups": (10, 20, 1.0, True),
        "10 groups, alike": (10, 20, 0.0, False),
        "12 groups of 50": (12, 50, 1.0, False),
        "100 groups of 5": (100, 5, 1.0, False),
        "400 single pairs": (400, 1, 0.0, False),
    }
    for name, (count, size, spread, unequal) in cases.items():
        random = keyed_generator(0, "coverage", name)
        truth = float(expit(1.4 + spread * random.normal(size=1_000_000)).mean())
        held = []
        for _ in range(REPETITIONS):
            sizes = 1 + random.geometric(1 / size, count) if unequal else np.full(count, size)
            groups = np.repeat(np.arange(count), sizes)
            rates = expit(1.4 + spread * random.normal(size=count))[groups]
            share = Groups.by(groups).share((random.random(len(groups)) < rates).astype(float))
            held.append(share.low is not None and share.high is not None and share.low <= truth <= share.high)
        yield from _between(f"accuracy, {name}", held)
    yield from _between("accuracy, pairs that share texts", list(_sharing_texts()))
    held_length, held_ece = [], []
    for seed in range(REPETITIONS):
        random = keyed_generator(seed, "calibrated")
        delta = random.normal(0, 2, 500)
        label = (random.random(500) < expit(delta)).astype(float)
        excess = calibration(delta, label, Groups.by(range(500)), seed=seed).excess
        held_ece.append((excess.low or 0.0) <= 0 <= (excess.high or 0.0))
        if seed < REPETITIONS // 2:
            overpaid = judged(Responses.draw(seed, PROMPTS), perfect).evaluation.length.overpayment.share
            held_length.append((overpaid.low or 0.0) <= 0 <= (overpaid.high or 0.0))
    yield from _between("calibration excess of calibrated models", held_ece)
    yield from _between("overpaid length of perfect models", held_length)
    falls = []
    for seed in range(REPETITIONS):
        random = keyed_generator(seed, "best-of-n")
        proxy = random.normal(size=(50, 32))
        curve = best_of_n_curve(proxy, 0.3 * np.tanh(proxy) + random.normal(size=(50, 32)), [2, 4, 8, 16, 32])
        falls.append((curve.drop.low or 0.0) > 0)
    yield Result("over-optimisation found where there is none, 50 prompts", float(np.mean(falls)), target="<= 0.05")


def _sharing_texts() -> Iterator[bool]:
    random = keyed_generator(0, "texts")

    def drawn() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        quality, wrong = random.normal(size=(2, 100))
        first = np.repeat(np.arange(100), 3)
        second = (first + random.integers(1, 100, len(first))) % 100
        true = quality[first] - quality[second]
        label = random.random(len(first)) < expit(2 * true)
        right = (true + wrong[first] - wrong[second] > 0) == label
        return right.astype(float), np.stack([first, second], axis=1)

    truth = np.mean([drawn()[0].mean() for _ in range(10_000)])
    for _ in range(REPETITIONS):
        right, texts = drawn()
        share = replace(Groups.by(range(len(right))), texts=texts).share(right)
        yield share.low is not None and share.high is not None and bool(share.low <= truth <= share.high)


def _between(name: str, held: list[bool]) -> Iterator[Result]:
    share = float(np.mean(held))
    yield Result(f"coverage: {name}", share, target=">= 0.92")
    yield Result(f"not above: {name}", share, target="<= 0.98")


def main() -> None:
    parser = argparse.ArgumentParser(description="The judgement of reward models of which everything is known.")
    parser.add_argument("--seeds", type=int, default=20)
    seeds = parser.parse_args().seeds
    report = Report("judgement")
    report.add(list(false_refusals(seeds)), "false refusals")
    report.add(list(power(seeds)), "power against faults")
    report.add(list(said(seeds)), "figures beside the truth")
    report.add(list(coverage()), "coverage of 95 % intervals")


if __name__ == "__main__":
    main()
