"""What a small backbone learns from a few hundred votes: `python -m bench.pandalm --votes FILE`

The votes are the human test set of PandaLM (Wang et al. 2023, arXiv 2306.05087): 700 comparisons of answers to a
hundred instructions, with three votes each and many ties. A keyed third of the prompts is held out. There are no
targets: so little data, and so hard, is to be reported as it is, with its interval.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.commands import read_json, train_reward_model
from bench.results import Result, publish
from rlhf_ray.randomness import keyed_generator

CONFIG = "configs/reward-model/votes.yaml"


def split(votes: Path, folder: Path) -> tuple[Path, Path]:
    """Training and held-out rows, by prompt."""
    lines = votes.read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    held_out = {prompt for prompt in prompts if keyed_generator(0, "split", prompt).random() < 1 / 3}
    paths = folder / "train.jsonl", folder / "test.jsonl"
    for path, side in zip(paths, (False, True), strict=True):
        rows = (line + "\n" for line, prompt in zip(lines, prompts, strict=True) if (prompt in held_out) == side)
        path.write_text("".join(rows), encoding="utf-8")
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description="What a small backbone learns from a few hundred votes.")
    parser.add_argument("--votes", type=Path, required=True, help="JSONL with prompt, response_a, response_b and votes")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with minilm")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        runs = Path(folder)
        train, test = split(arguments.votes, runs)
        overrides = [f"paths.data={arguments.data}", f"pairs.path={train}", f"held_out.path={test}"]
        status, seconds = train_reward_model(CONFIG, runs, "votes", overrides)
        data = read_json(runs / "votes" / "data.json")
        report = read_json(runs / "votes" / "evaluation.json")["pairs"]
    shorter = report["length"]["accuracy_shorter_preferred"]
    publish(
        "pandalm",
        [
            Result("training pairs", data["training"]["pairs"]),
            Result("bad rows left out", data["training"]["bad_rows"] + data["held_out"]["bad_rows"]),
            Result("held-out pairs", report["pairs"]),
            Result("held-out ties", report["ties"]),
            Result("accuracy", report["accuracy"]["value"]),
            Result("accuracy, lower end of 95 %", report["accuracy"]["low"]),
            Result("accuracy, upper end of 95 %", report["accuracy"]["high"]),
            Result("agreement with single votes", report["vote_accuracy"]),
            Result("ceiling of that agreement", report["ceiling"]["accuracy"]),
            Result("accuracy where the shorter is preferred", shorter["value"]),
            Result("share of score differences overpaid for length", report["length"]["overpayment"]["share"]["value"]),
            Result("longer preferred, by people", report["length"]["longer_preferred"]["value"]),
            Result("exit status of train-rm (1: refused)", status),
            Result("whole command", seconds, "s"),
        ],
    )


if __name__ == "__main__":
    main()
