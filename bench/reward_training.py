"""Pairs per second in training, ours against TRL's `RewardTrainer`: `python -m bench.reward_training --trl FOLDER`

Both train all of MiniLM on the same batches of the same tokens, with AdamW, no dropout and no gradient checkpointing,
on as many threads: TRL in one process, ours as ranks of one thread each through Ray and DeepSpeed, which is how
`configs/reward-model/hutto-movie.yaml` trains. bfloat16 is what each makes of it: autocast over float32 weights in TRL,
bfloat16 weights with float32 masters in DeepSpeed. They run in alternation, and the median of the rounds counts.

Time is the wall clock from the end of the last warm-up step to the end of the last one: collating, logging and
what a step waits for are in it. Beside it stand the tokens that go through the model for each pair, padding included:
the part of the difference that is work not done.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from transformers import AutoTokenizer

from bench.results import Result, publish
from rlhf_ray.randomness import batch_rows

SEED = 0
DTYPES = ("float32", "bfloat16")
TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Work:
    """What both train on.

    Attributes:
        model: the backbone.
        pairs: preference data.
        steps: optimizer steps of a run, the warm-up included.
        warm_up: first steps that do not count.
        threads: compute threads in all.
    """

    model: Path
    pairs: Path
    batch_size: int
    steps: int
    warm_up: int
    threads: int


@dataclass(frozen=True)
class Speed:
    """One run.

    Attributes:
        tokens_per_pair: through the model, padding included.
    """

    pairs_per_s: float
    tokens_per_pair: float


@dataclass(frozen=True)
class Tokens:
    """The pairs of all steps as tokens, in the order of training."""

    chosen: tuple[tuple[int, ...], ...]
    rejected: tuple[tuple[int, ...], ...]

    def per_pair(self, first: int) -> float:
        """Tokens a pair without padding, of the pairs from `first` on."""
        texts = self.chosen[first:] + self.rejected[first:]
        return sum(map(len, texts)) / (len(texts) / 2)


def read_tokens(work: Work) -> Tokens:
    """The rows that `train-rm` will take, step by step."""
    with work.pairs.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    steps = (batch_rows(len(rows), work.batch_size, SEED, step) for step in range(work.steps))
    order = [rows[index] for step in steps for index in step]
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    chosen, rejected = (
        tuple(tuple(tokenizer(row["prompt"] + row[name]).input_ids) for row in order) for name in ("chosen", "rejected")
    )
    return Tokens(chosen, rejected)


def run_ours(work: Work, dtype: str, folder: Path) -> Speed:
    config = {
        "run": {"name": "ours", "seed": SEED},
        "paths": {"runs": str(folder)},
        "model": str(work.model.absolute()),
        "pairs": {"path": str(work.pairs.absolute())},
        "learner": {"replicas": work.threads, "dtype": dtype, "learning_rate": 1e-4, "micro_batch_tokens": 4096},
        "training": {"batch_size": work.batch_size, "steps": work.steps},
        "gate": {"enabled": False},
    }
    path = folder / "ours.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    _run([sys.executable, "-m", "rlhf_ray", "train-rm", str(path)], {})
    with (folder / "ours" / "metrics.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return _speed(work, [row["wall_s"] for row in rows], [row["tokens/computed"] for row in rows])


def run_trl(work: Work, dtype: str, folder: Path, trl: Path, tokens: Tokens) -> Speed:
    pairs = folder / "tokens.jsonl"
    rows = (
        json.dumps({"chosen_ids": chosen, "rejected_ids": rejected}) + "\n"
        for chosen, rejected in zip(tokens.chosen, tokens.rejected, strict=True)
    )
    pairs.write_text("".join(rows), encoding="utf-8")
    script = Path(__file__).with_name("trl_reward_training.py")
    command = [sys.executable, str(script), "--model", str(work.model), "--pairs", str(pairs), "--dtype", dtype]
    command += ["--batch-size", str(work.batch_size), "--threads", str(work.threads)]
    environment = {"PYTHONPATH": str(trl.absolute()), "OMP_NUM_THREADS": str(work.threads)}
    report = json.loads(_run(command, environment).splitlines()[-1])
    return _speed(work, report["step_ends_s"], report["tokens"])


def _run(command: Sequence[str], environment: dict[str, str]) -> str:
    """Standard output of a process that ends well."""
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{last}")
    return done.stdout


def _speed(work: Work, step_ends_s: Sequence[float], tokens: Sequence[int]) -> Speed:
    if len(step_ends_s) != work.steps or len(tokens) != work.steps:
        raise RuntimeError(f"{len(step_ends_s)} steps and {len(tokens)} batches where {work.steps} were asked for")
    pairs = work.batch_size * (work.steps - work.warm_up)
    return Speed(pairs / (step_ends_s[-1] - step_ends_s[work.warm_up - 1]), sum(tokens[work.warm_up :]) / pairs)


def results_of(dtype: str, ours: Sequence[Speed], trl: Sequence[Speed]) -> list[Result]:
    results = []
    for name, runs in (("ours", ours), ("TRL", trl)):
        speeds = [run.pairs_per_s for run in runs]
        results.append(Result(f"{dtype}: {name}", statistics.median(speeds), "pairs/s"))
        results.append(Result(f"{dtype}: {name}, slowest round", min(speeds), "pairs/s"))
        results.append(Result(f"{dtype}: {name}, fastest round", max(speeds), "pairs/s"))
        results.append(Result(f"{dtype}: {name}, tokens computed", runs[0].tokens_per_pair, "tokens/pair"))
    # Rounds are compared with their neighbour in time, so that a machine that slows down slows both.
    ratios = [one.pairs_per_s / other.pairs_per_s for one, other in zip(ours, trl, strict=True)]
    results.append(Result(f"{dtype}: ours over TRL", statistics.median(ratios), "×", ">= 1.5"))
    saved = trl[0].tokens_per_pair / ours[0].tokens_per_pair
    results.append(Result(f"{dtype}: of that, tokens saved", saved, "×"))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares our reward-model training with TRL's, in pairs per second.")
    parser.add_argument("--trl", type=Path, required=True, help="folder that TRL was installed into (pip --target)")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with hutto-movie and minilm")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25, help="of each run, the warm-up included")
    parser.add_argument("--warm-up", type=int, default=5, help="steps that do not count")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if not 0 < arguments.warm_up < arguments.steps:
        parser.error(f"--warm-up {arguments.warm_up} leaves nothing to measure of --steps {arguments.steps}")
    work = Work(
        model=arguments.data / "minilm",
        pairs=arguments.data / "hutto-movie" / "pairs_train.jsonl",
        batch_size=32,
        steps=arguments.steps,
        warm_up=arguments.warm_up,
        threads=arguments.threads,
    )
    tokens = read_tokens(work)
    real = tokens.per_pair(work.batch_size * work.warm_up)
    results = [Result("tokens without padding", real, "tokens/pair")]
    for dtype in arguments.dtypes:
        ours, trl = [], []
        for number in range(1, arguments.rounds + 1):
            with TemporaryDirectory() as folder:
                trl.append(run_trl(work, dtype, Path(folder), arguments.trl, tokens))
                ours.append(run_ours(work, dtype, Path(folder)))
            print(f"{dtype}, round {number}: TRL {trl[-1].pairs_per_s:.1f}, ours {ours[-1].pairs_per_s:.1f} pairs/s")
        results += results_of(dtype, ours, trl)
    publish("reward_training", results)


if __name__ == "__main__":
    main()
