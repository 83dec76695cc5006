"""Do ensembles keep a best-of-n sampler from exploiting a reward model? `python -m bench.overoptimisation`

The question of Coste et al. (2023, arXiv 2310.02743): with a quarter of the labels flipped, is more gold reward left
when the sampler maximises an ensemble of five than when it maximises one of the five, at equal n and so at equal KL
from the base distribution? Members see the same pairs, flips included, and differ by their first weights and the
order of the pairs. Every seed draws its own pairs, flips and members.

- `movie`: held-out movie snippets are the samples, the mean rating of their human raters is gold, proxies are small
  networks on frozen MiniLM embeddings. The samples lie where the training texts lie.
  All seeds rank the same thousand snippets, so the standard error does not speak for other snippets.
- `synthetic`: texts are heavy-tailed vectors. Gold saturates in one direction and falls with the square of the length
  beyond a bound; ReLU networks go on linearly where pairs are few, and a large n looks exactly there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.results import FOLDER, Result, publish
from rlhf_ray.randomness import keyed_generator
from rlhf_ray.reward.core.ensemble import MemberAggregation, aggregate_members, fit_member_scale, standardise
from rlhf_ray.reward.core.loading import pad_texts
from rlhf_ray.reward.judge.best_of_n import best_of_n_curve, kl_bound
from rlhf_ray.reward.train.preference import bradley_terry_loss

Array = NDArray[np.float64]

MEMBERS = 5
FLIPPED = 0.25
VARIANCE_WEIGHT = 0.5
ENSEMBLES: tuple[MemberAggregation, ...] = ("minimum", "mean", "mean_minus_variance")
LABELS = {"minimum": "minimum", "mean": "mean", "mean_minus_variance": f"mean − {VARIANCE_WEIGHT}·variance"}


@dataclass(frozen=True)
class Sample:
    """What one seed draws.

    Attributes:
        chosen, rejected: `[P, D]` training pairs, a quarter of them the wrong way round.
        pool: `[S, N, D]` samples of the base distribution, for each of S prompts.
        gold: `[S, N]` their true reward.
    """

    chosen: Array
    rejected: Array
    pool: Array
    gold: Array


@dataclass(frozen=True)
class Task:
    """One setting of the question.

    Attributes:
        draw: a sample from a seed.
        unit: of the gold reward.
        ns: best of how many, rising, from 1.
        reported: those of them that go into the results.
    """

    name: str
    draw: Callable[[int], Sample]
    unit: str
    ns: tuple[int, ...]
    reported: tuple[int, ...]


@dataclass(frozen=True)
class Curves:
    """Gold reward of the best of n by each proxy.

    Attributes:
        members: `[seeds, K, n]`.
        ensembles: `[seeds, n]` by aggregation.
    """

    members: Array
    ensembles: dict[MemberAggregation, Array]

    @property
    def single(self) -> Array:
        """`[seeds, n]`, the mean over an ensemble's own members."""
        return self.members.mean(axis=1)


def synthetic(seed: int, pairs: int = 500, features: int = 16, prompts: int = 4, samples: int = 8192) -> Sample:
    """Vectors of a multivariate t distribution with 5 degrees of freedom; gold in its standard deviations."""
    generator = keyed_generator(seed, "synthetic")
    direction = generator.normal(size=features) / features**0.5

    def texts(*shape: int) -> Array:
        return generator.normal(size=(*shape, features)) / np.sqrt(generator.chisquare(5, size=(*shape, 1)) / 5)

    def gold_reward(vectors: Array) -> Array:
        too_long = np.maximum(np.square(vectors).mean(axis=-1) - 1.5, 0)
        return 1.5 * np.tanh(vectors @ direction) - 0.2 * too_long

    first, second = texts(pairs), texts(pairs)
    chosen, rejected = _labelled(first, second, gold_reward(first) > gold_reward(second), generator)
    pool = texts(prompts, samples)
    gold = gold_reward(pool)
    return Sample(chosen, rejected, pool, (gold - gold.mean()) / gold.std())


def movie(data: Path, seed: int, pairs: int = 1000) -> Sample:
    """Embedded movie snippets; gold in points of the raters' scale, from the mean of the pool."""
    train, pool, gold = _movie_snippets(data)
    generator = keyed_generator(seed, "movie")
    rows = _movie_rows(data, "pairs_train")
    picked = [rows[row] for row in generator.choice(len(rows), size=pairs, replace=False)]
    chosen, rejected = (np.stack([train[row[side]] for row in picked]) for side in ("id_chosen", "id_rejected"))
    chosen, rejected = _labelled(chosen, rejected, np.ones(pairs, dtype=bool), generator)
    return Sample(chosen, rejected, pool[None], (gold - gold.mean())[None])


def _labelled(
    first: Array, second: Array, first_is_better: NDArray[np.bool_], generator: np.random.Generator
) -> tuple[Array, Array]:
    """Chosen and rejected, with labels flipped."""
    first_is_chosen = (first_is_better ^ (generator.random(len(first)) < FLIPPED))[:, None]
    return np.where(first_is_chosen, first, second), np.where(first_is_chosen, second, first)


@cache
def _movie_rows(data: Path, name: str) -> list[dict[str, Any]]:
    with (data / "hutto-movie" / f"{name}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@cache
def _movie_snippets(data: Path) -> tuple[dict[int, Array], Array, Array]:
    """Embeddings of the training snippets by id; those of the held-out ones, and their mean ratings."""
    pairs, test = _movie_rows(data, "pairs_train"), _movie_rows(data, "snippets_test")
    texts = {row[f"id_{side}"]: row["prompt"] + row[side] for row in pairs for side in ("chosen", "rejected")}
    print(f"embedding {len(texts)} training and {len(test)} held-out snippets", flush=True)
    vectors = _embed(data / "minilm", [*texts.values(), *(row["text"] for row in test)])
    train = dict(zip(texts, vectors[: len(texts)], strict=True))
    return train, vectors[len(texts) :], np.array([row["rating"] for row in test])


@torch.inference_mode()
def _embed(model: Path, texts: Sequence[str]) -> Array:
    """`[n, D]`: the last layer's mean over a text's tokens."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    token_ids = [tokenizer(text).input_ids for text in texts]
    order = sorted(range(len(texts)), key=lambda index: len(token_ids[index]))
    vectors = np.zeros((len(texts), network.config.hidden_size))
    for start in range(0, len(order), 64):
        rows = order[start : start + 64]
        batch = pad_texts([token_ids[row] for row in rows], tokenizer.pad_token_id)
        mask = batch["attention_mask"][..., None]
        hidden = network(**batch).last_hidden_state
        vectors[rows] = ((hidden * mask).sum(1) / mask.sum(1)).double().numpy()
    return vectors


def train_members(
    chosen: Array, rejected: Array, seed: int, *, hidden: int = 64, epochs: int = 10, batch: int = 50
) -> Callable[[Array], Array]:
    """Networks with one hidden layer, trained side by side with Adam and the Bradley-Terry loss.

    Returns:
        The proxies: features `[..., D]` to scores `[..., K]` in standard deviations within a training pair.
    """
    texts = np.concatenate([chosen, rejected])
    mean, std = texts.mean(axis=0), texts.std(axis=0)
    size = chosen.shape[-1]
    generators = [keyed_generator(seed, "member", member) for member in range(MEMBERS)]

    def weights(*shape: int, fan_in: int) -> torch.Tensor:
        drawn = np.stack([generator.normal(size=shape) for generator in generators]) * (2 / fan_in) ** 0.5
        return torch.tensor(drawn, dtype=torch.float32, requires_grad=True)

    first, second = weights(size, hidden, fan_in=size), weights(hidden, 1, fan_in=hidden)
    bias = torch.zeros(MEMBERS, 1, hidden, requires_grad=True)

    def forward(features: torch.Tensor) -> torch.Tensor:
        """`[K, n, D]` to `[K, n]`."""
        return (torch.relu(features @ first + bias) @ second)[..., 0]

    def prepared(features: Array) -> torch.Tensor:
        return torch.tensor((features - mean) / std, dtype=torch.float32)

    optimizer = torch.optim.Adam([first, second, bias], lr=3e-3)
    better, worse = prepared(chosen), prepared(rejected)
    ones = torch.ones(MEMBERS * batch)
    for _ in range(epochs):
        orders = np.stack([generator.permutation(len(chosen)) for generator in generators])
        for start in range(0, len(chosen) - batch + 1, batch):
            rows = torch.from_numpy(orders[:, start : start + batch])
            # The sum over members: no member's gradient knows of the others.
            loss = bradley_terry_loss(
                forward(better[rows]).flatten(),
                forward(worse[rows]).flatten(),
                chosen_probability=ones,
                margin=None,
                weight=ones / batch,
                label_smoothing=0.0,
                centering=0.0,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.inference_mode()
    def raw_scores(features: Array) -> Array:
        flat = prepared(features.reshape(-1, size))
        return forward(flat.expand(MEMBERS, -1, -1)).T.double().numpy().reshape(*features.shape[:-1], MEMBERS)

    scale = fit_member_scale(raw_scores(chosen), raw_scores(rejected))
    return lambda features: standardise(raw_scores(features), scale)


def measure(task: Task, seeds: int) -> Curves:
    members, ensembles = [], []
    for seed in range(seeds):
        sample = task.draw(seed)
        scores = train_members(sample.chosen, sample.rejected, seed)(sample.pool)

        def gold_left(proxy: Array, gold: Array = sample.gold) -> list[float]:
            return [point.gold for point in best_of_n_curve(proxy, gold, task.ns).points]

        members.append([gold_left(scores[..., member]) for member in range(MEMBERS)])
        ensembles.append([gold_left(aggregate_members(scores, how, VARIANCE_WEIGHT)) for how in ENSEMBLES])
        print(f"{task.name}: seed {seed + 1} of {seeds}", flush=True)
    return Curves(np.array(members), dict(zip(ENSEMBLES, np.array(ensembles).transpose(1, 0, 2), strict=True)))


def results_of(task: Task, curves: Curves) -> list[Result]:
    """Some columns of the table; the target is at the largest n, where a proxy is exploited most."""
    results = []
    for n in task.reported:
        column = task.ns.index(n)
        single = curves.single[:, column]
        results.append(Result(f"{task.name} n={n}: single members", float(single.mean()), task.unit))
        for how, gold in curves.ensembles.items():
            above = gold[:, column] - single
            name = f"{task.name} n={n}: {how} − single"
            # Coste et al. too find the mean exploited with noisy labels: no target for it.
            target = "> 0" if n == task.ns[-1] and how != "mean" else None
            results.append(Result(name, float(above.mean()), task.unit, target))
            results.append(Result(f"{name}, s.e.", _standard_error(above), task.unit))
            results.append(Result(f"{name}, seeds ahead", int((above > 0).sum()), f"of {len(above)}"))
    return results


def print_table(task: Task, curves: Curves) -> None:
    from rich.console import Console
    from rich.table import Table

    seeds = len(curves.members)
    title = f"{task.name}: gold reward ({task.unit}), mean ± standard error over {seeds} seeds\n"
    title += "in brackets by how much it is above the single members, and in how many seeds"
    table = Table(title=title, title_justify="left")
    for heading in ("n", "KL", "single members", *(LABELS[how] for how in curves.ensembles)):
        table.add_column(heading, justify="right")
    for column, n in enumerate(task.ns[1:], start=1):
        single = curves.single[:, column]
        cells = [str(n), f"{kl_bound(n):.2f}", f"{single.mean():+.3f} ± {_standard_error(single):.3f}"]
        for gold in curves.ensembles.values():
            own, above = gold[:, column], gold[:, column] - single
            cells.append(
                f"{own.mean():+.3f} ({above.mean():+.3f} ± {_standard_error(above):.3f}, {(above > 0).sum()}/{seeds})"
            )
        table.add_row(*cells)
    Console(width=150).print(table)


def plot(tasks: Sequence[tuple[Task, Curves]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(tasks), figsize=(5.4 * len(tasks), 4.2), layout="constrained")
    colors = {"minimum": "#3b6ea5", "mean": "#3f9142", "mean_minus_variance": "#d9730d"}
    for axes, (task, curves) in zip(np.atleast_1d(panels), tasks, strict=True):
        distance = [kl_bound(n) ** 0.5 for n in task.ns]
        for member in curves.members.reshape(-1, len(task.ns)):
            axes.plot(distance, member, color="#8a8a8a", linewidth=0.5, alpha=0.35)
        axes.plot(distance, curves.single.mean(0), color="#444444", linewidth=2, label="single members, mean")
        for how, gold in curves.ensembles.items():
            axes.plot(distance, gold.mean(0), color=colors[how], linewidth=2.2, label=f"ensemble: {LABELS[how]}")
        axes.set(title=f"{task.name} ({len(curves.members)} seeds)", xlabel="√KL", ylabel=f"gold reward ({task.unit})")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6")
        lowest, highest = np.quantile(curves.members, [0.02, 1])
        axes.set_ylim(lowest - 0.05 * (highest - lowest), highest + 0.1 * (highest - lowest))
    np.atleast_1d(panels)[0].legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _standard_error(values: Array) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description="Gold reward under best-of-n: single reward models and ensembles.")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with hutto-movie and minilm")
    parser.add_argument("--seeds", type=int, default=20, help="at least 2")
    arguments = parser.parse_args()
    # Networks this small compute faster in one thread than two can wait for each other.
    torch.set_num_threads(1)
    tasks = (
        Task("movie", partial(movie, arguments.data), "points", (1, 2, 4, 8, 16, 32, 64, 128, 256), (16, 64, 256)),
        Task("synthetic", synthetic, "std", (1, 4, 16, 64, 256, 1024, 4096), (16, 256, 4096)),
    )
    measured = [(task, measure(task, arguments.seeds)) for task in tasks]
    for task, curves in measured:
        print_table(task, curves)
    plot(measured, FOLDER / "overoptimisation.png")
    publish("overoptimisation", [result for task, curves in measured for result in results_of(task, curves)])


if __name__ == "__main__":
    main()
