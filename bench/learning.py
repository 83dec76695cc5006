"""Does every algorithm learn? `python -m bench.learning`

Each preset of docs/algorithms.md, as it is written there but for the sizes, trains the tiny policy against a reward
function whose answer is known (`bench/letters.py`). What is measured is the rise of the held-out reward over the
untrained policy, sampled for the same prompts with the same seeds, with its 95 % interval over prompts.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bench.results import Report, Result
from rlhf_ray.ppo.evaluation import load_samples
from rlhf_ray.reward.core.evaluator import EvaluatedSample

PAGE = Path(__file__).parents[1] / "docs" / "algorithms.md"
SAMPLES, TOKENS = 64, 16
TIMEOUT_S = 900.0


def presets() -> dict[str, dict[str, Any]]:
    """The blocks of the page by their headings."""
    section = PAGE.read_text(encoding="utf-8").split("## Presets", 1)[1]
    found = re.findall(r"^### ([^\n]+)\n.*?```yaml\n(.*?)```", section, re.MULTILINE | re.DOTALL)
    return {name: yaml.safe_load(block) for name, block in found}


def configuration(
    preset: Mapping[str, Any], data: Path, runs: Path, name: str, steps: int, seed: int = 0
) -> dict[str, Any]:
    """A run of the tiny policy with a preset."""
    algorithm = dict(preset["algorithm"])
    if "length" in algorithm:
        algorithm["length"] = {**algorithm["length"], "overlong_buffer": TOKENS // 4}
    sampling = dict(preset["sampling"])
    sampling.pop("max_response_tokens", None)  # the tiny policy's responses are TOKENS long
    group = min(sampling.pop("samples_per_prompt"), 8)
    spare = sampling.pop("spare_prompts", 0) // sampling.pop("prompts_per_step", 1)
    assert not sampling, f"what of a preset's sampling is not taken over: {sampling}"
    learner = {"dtype": "float32", "learning_rate": 1e-3, "micro_batch_tokens": 2048}
    return {
        "run": {"name": name, "seed": seed},
        "paths": {"data": str(data.absolute()), "runs": str(runs)},
        "steps": steps,
        "prompts": {"path": str(data.absolute() / "tiny" / "prompts.jsonl")},
        "policy": {"model": str(data.absolute() / "tiny" / "policy"), "learner": learner},
        **({"critic": {"learner": learner}} if "critic" in preset else {}),
        "reference": preset.get("reference", {"dtype": "float32"}),
        "reward": {"function": "bench.letters:words_with_e", "batch_size": SAMPLES},
        "generator": {"dtype": "float32", "kv_cache_gib": 0.05, "max_concurrent_sequences": SAMPLES},
        "sampling": {
            "prompts_per_step": SAMPLES // group,
            "samples_per_prompt": group,
            "spare_prompts": SAMPLES // group * spare,
            "prompts_per_shard": SAMPLES // group // 2,
            "max_prompt_tokens": 64,
            "max_response_tokens": TOKENS,
        },
        "algorithm": algorithm,
        "evaluation": {
            "prompts": {"path": str(data.absolute() / "tiny" / "prompts_test.jsonl")},
            "samples_per_prompt": 8,
        },
        "checkpoint": {"every_steps": 1000},
        "cluster": {"num_cpus": 2, "object_store_gib": 0.2},
        "tracking": {"progress": "off"},
    }


def train(config: Mapping[str, Any], runs: Path) -> Path:
    """One run; gives its folder."""
    name = config["run"]["name"]
    path = runs / f"{name}.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # which YAML reads
    subprocess.run([sys.executable, "-m", "rlhf_ray", "ppo", str(path)], timeout=TIMEOUT_S, check=True)
    return runs / name


def rise(folder: Path) -> tuple[float, float]:
    """Mean over the held-out prompts of how much their reward rose, and half of its 95 % interval."""
    [before] = folder.glob("held_out_before-*.jsonl")
    earlier, later = (_by_prompt(load_samples(path)) for path in (before, folder / "held_out_after.jsonl"))
    rises = [later[prompt] - earlier[prompt] for prompt in earlier]
    return statistics.fmean(rises), 1.96 * statistics.stdev(rises) / len(rises) ** 0.5


def _by_prompt(samples: list[EvaluatedSample]) -> dict[int, float]:
    rewards: dict[int, list[float]] = {}
    for sample in samples:
        if sample.reward is not None:
            rewards.setdefault(sample.prompt_id, []).append(sample.reward)
    return {prompt: statistics.fmean(scores) for prompt, scores in rewards.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.learning", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with tiny")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--presets", default="", help="names with commas between them; default: all")
    arguments = parser.parse_args()
    chosen = [name for name in arguments.presets.split(",") if name]
    report = Report("learning")
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        for name, preset in presets().items():
            if chosen and name not in chosen:
                continue
            run = re.sub(r"\W+", "-", name.lower()).strip("-")
            mean, half = rise(train(configuration(preset, arguments.data, runs, run, arguments.steps), runs))
            report.add(
                [
                    Result(f"{name}: rise of the held-out reward", mean),
                    Result(f"{name}: lower end of its 95 % interval", mean - half, target="> 0"),
                ],
                name,
            )


if __name__ == "__main__":
    main()
