"""Does the release gate tell sound reward models from broken ones? `python -m bench.gate`

Twenty MiniLM models of movie ratings that differ by their seed (first weights of the head, order of the pairs, dropout)
go through training, evaluation and all checks, vLLM's included, and all should be released. Then the directory of one
of them is broken in the classic ways, one at a time, and each should be refused. Faults of data and judgement are on
trial in `bench/judgement.py`.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from bench.commands import read_json, train_reward_model
from bench.hutto_movie import CONFIG
from bench.results import Result, publish
from rlhf_ray.config.reward import RewardSettings
from rlhf_ray.config.reward_model import GateSettings, PreferenceSettings
from rlhf_ray.data.preferences import load_preferences
from rlhf_ray.failures import BadInput
from rlhf_ray.reward.core.loading import load_reward_tokenizer
from rlhf_ray.reward.judge.inspector import RewardInspector
from tests import planting

SHORT = (
    "training.steps=30",
    "learner.trainable_top_layers=3",
    "learner.learning_rate=3e-4",
    "learner.warmup_steps=3",
    "held_out.limit=800",
    "gate.min_accuracy=0.6",
    # Half-trained, and judged on few pairs: scores are monotone in quality, but not yet in people's odds.
    "gate.max_calibration_excess=0.1",
)
"""Enough to learn most of it: the gate is on trial here, not the model."""
FAULTS: tuple[Callable[[Path], None], ...] = (
    planting.plant_pad_is_eos,
    planting.plant_padding_in_front,
    planting.plant_missing_head,
    planting.plant_new_head,
    planting.plant_other_weights,
    planting.plant_other_template,
)


def refused(folder: Path, texts: list[str], tolerance: float) -> bool:
    """Whether any check of the directory fails."""
    try:
        checks = RewardInspector(RewardSettings(model=str(folder))).inspect(texts, tolerance)
    except BadInput:
        return True
    return any(check.passed is False for check in checks)


def main() -> None:
    parser = argparse.ArgumentParser(description="The release gate on sound and on broken models.")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with hutto-movie and minilm")
    parser.add_argument("--models", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    released = 0
    with TemporaryDirectory() as folder:
        runs = Path(folder)
        for seed in range(arguments.models):
            overrides = [*SHORT, f"paths.data={arguments.data}", f"run.seed={seed}"]
            status, seconds = train_reward_model(CONFIG, runs, f"seed-{seed}", overrides)
            summary = runs / f"seed-{seed}" / "summary.json"
            if not summary.exists():
                raise SystemExit(f"seed {seed}: train-rm ended with status {status} before its model was judged")
            sound = read_json(summary)["released"]
            released += sound
            print(f"seed {seed}: {'released' if sound else 'refused'} after {seconds:.0f} s", flush=True)
            if seed:
                shutil.rmtree(runs / f"seed-{seed}")
        model = runs / "seed-0" / "reward_model"
        tokenizer = load_reward_tokenizer(str(model), "model")
        pairs = PreferenceSettings(path=str(arguments.data / "hutto-movie" / "pairs_test.jsonl"), limit=32)
        texts = [pair.prompt + pair.chosen for pair in load_preferences(pairs, tokenizer, "pairs.path").pairs]
        tolerance = GateSettings().max_engine_difference
        results = [
            Result("sound models", arguments.models),
            Result("sound models released", released, target=f">= {arguments.models}"),
            Result("the unbroken copy refused", refused(model, texts, tolerance), target="<= 0"),
        ]
        for plant in FAULTS:
            broken = shutil.copytree(model, runs / plant.__name__)
            plant(broken)
            name = plant.__name__.removeprefix("plant_").replace("_", " ")
            results.append(Result(f"refused: {name}", refused(broken, texts, tolerance), target=">= 1"))
    publish("gate", results)


if __name__ == "__main__":
    main()
