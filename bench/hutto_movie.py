"""A reward model of human ratings from end to end: `python -m bench.hutto_movie`

`configs/reward-model/hutto-movie.yaml` as it is: accuracy on snippets that were not trained on, calibration, and the
time of the whole command, judging and gate included. Then what the batch-invariant mode of the scorer costs, and how
far transformers and vLLM are from the scorer, on the model that came out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

from bench.commands import read_json, train_reward_model
from bench.results import Result, publish
from rlhf_ray.config.reward import RewardSettings
from rlhf_ray.config.reward_model import PreferenceSettings
from rlhf_ray.data.preferences import load_preferences
from rlhf_ray.randomness import keyed_generator
from rlhf_ray.reward.core.loading import load_reward_tokenizer
from rlhf_ray.reward.core.scorer import RewardScorer
from rlhf_ray.reward.judge.pooling_engine import PoolingEngine

CONFIG = "configs/reward-model/hutto-movie.yaml"
TEXTS = 256
CALL_SIZES = (*range(1, 17), 24, 32, 48, 63, 64)


def training_results(runs: Path, data: Path, overrides: list[str]) -> list[Result]:
    """One run of the configuration."""
    status, seconds = train_reward_model(CONFIG, runs, "hutto-movie", [f"paths.data={data}", *overrides])
    summary = read_json(runs / "hutto-movie" / "summary.json")
    figures = summary["reward_model"]
    excess = figures["calibration_error_scaled"] - figures["calibration_floor"]
    return [
        Result("held-out pairs, gap >= 1", figures["pairs"]),
        Result("accuracy", figures["accuracy"], target=">= 0.90"),
        Result("accuracy, lower end of 95 %", figures["accuracy_low"]),
        Result("accuracy, upper end of 95 %", figures["accuracy_high"]),
        Result("agreement with single votes", figures["vote_accuracy"]),
        Result("ceiling of that agreement", figures["vote_ceiling"]),
        Result("calibration error as it is", figures["calibration_error"]),
        Result("calibration error after scaling", figures["calibration_error_scaled"]),
        Result("its sampling floor", figures["calibration_floor"]),
        Result("calibration error above its floor", excess, target="<= 0.02"),
        Result("exit status of train-rm (0: released)", status, target="<= 0"),
        Result("whole command", seconds, "s", "<= 600 s"),
    ]


def invariance_results(model: Path, tokens: list[list[int]]) -> list[Result]:
    """Bit-for-bit equality within each mode, and the price of the fixed shapes, on one thread in float32."""
    fixed, free = (
        RewardScorer(RewardSettings(model=str(model), batch_invariant=invariant)) for invariant in (True, False)
    )
    expected = {scorer: scorer.score_tokens(tokens).scores for scorer in (fixed, free)}
    unequal = {fixed: 0, free: 0}
    random = keyed_generator(0, "call-order")
    for size in CALL_SIZES:
        order = random.permutation(len(tokens))[:64]
        for scorer in (fixed, free):
            found = [
                scorer.score_tokens([tokens[index] for index in order[start : start + size]]).scores
                for start in range(0, len(order), size)
            ]
            unequal[scorer] += int((np.concatenate(found) != expected[scorer][order]).sum())
    many = [_seconds(partial(scorer.score_tokens, tokens)) for scorer in (fixed, free)]
    one = [_seconds(partial(scorer.score_tokens, tokens[:1])) for scorer in (fixed, free)]
    return [
        Result("scores that differ by a bit, batch-invariant", unequal[fixed], target="<= 0"),
        Result("scores that differ by a bit, otherwise", unequal[free], target="<= 0"),
        Result("largest difference between the modes", float(np.abs(expected[fixed] - expected[free]).max())),
        Result("scoring, batch-invariant", len(tokens) / many[0], "texts/s"),
        Result("scoring, otherwise", len(tokens) / many[1], "texts/s"),
        Result("cost of invariance in batches", many[0] / many[1], "×"),
        Result("cost of invariance for a single text", one[0] / one[1], "×"),
    ]


def engine_results(model: Path, tokens: list[list[int]]) -> list[Result]:
    """Raw logits of three engines."""
    from transformers import AutoModelForSequenceClassification

    ours = RewardScorer(RewardSettings(model=str(model), batch_invariant=True)).score_tokens(tokens).heads[:, 0, 0]
    network = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        plain = np.array([float(network(input_ids=torch.tensor([ids])).logits[0, 0]) for ids in tokens])
    engine = PoolingEngine(str(model), str(model), max(map(len, tokens)))
    vllm: NDArray[np.float64] = engine.score_tokens(tokens)[:, 0]
    engine.close()
    return [
        Result("transformers and our scorer", float(np.abs(plain - ours).max()), target="<= 1e-5"),
        Result("vLLM and our scorer", float(np.abs(vllm - ours).max()), target="<= 1e-5"),
        Result("vLLM and transformers", float(np.abs(vllm - plain).max()), target="<= 1e-5"),
    ]


def held_out_tokens(model: Path, pairs: Path) -> list[list[int]]:
    """Distinct held-out texts of all lengths as the model is given them."""
    tokenizer = load_reward_tokenizer(str(model), "model")
    read = load_preferences(PreferenceSettings(path=str(pairs)), tokenizer, "pairs.path")
    texts = dict.fromkeys(pair.prompt + response for pair in read.pairs for response in (pair.chosen, pair.rejected))
    return [tokenizer(text).input_ids for text in list(texts)[:TEXTS]]


def _seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description="A reward model of human ratings from end to end.")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with hutto-movie and minilm")
    parser.add_argument("overrides", nargs="*", help="settings of train-rm, section.key=value")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        results = training_results(Path(folder), arguments.data, arguments.overrides)
        model = Path(folder) / "hutto-movie" / "reward_model"
        tokens = held_out_tokens(model, arguments.data / "hutto-movie" / "pairs_test.jsonl")
        results += invariance_results(model, tokens)
        results += engine_results(model, tokens)
    publish("hutto_movie", results)


if __name__ == "__main__":
    main()
