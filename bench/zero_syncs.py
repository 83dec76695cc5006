"""Full fine-tuning of tied models on one rank and two, at every ZeRO stage: each sync in float32.

Twenty steps of `rlhf-ray ppo` each; a run ends at the first sync that does not hold, so one that gets through has held
at every step. SmolLM2 takes short steps: the weights are the point, not the samples.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.results import Report, Result

TIMEOUT_S = 3600.0
MODELS = {
    "tiny tied": ("{data}/tiny/policy_tied", "1e-3"),
    "SmolLM2-135M": ("{data}/smollm2-135m", "1e-5"),
}
COMMON = (
    "critic=null",
    "algorithm.advantage=grpo",
    "algorithm.epochs=1",
    "algorithm.minibatches=1",
    "algorithm.kl.controller=fixed",
    "evaluation.prompts=null",
    "reward.on_too_long=truncate",
    "sampling.prompts_per_step=4",
    "sampling.prompts_per_shard=2",
    "sampling.max_response_tokens=12",
    "checkpoint.every_steps=1000",
    "cluster.object_store_gib=1.5",
    "tracking.progress=off",
)


def main() -> None:
    """Every model, stage and number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    report = Report("zero_syncs")
    with tempfile.TemporaryDirectory() as runs:
        for name in arguments.models.split(","):
            model, learning_rate = MODELS[name]
            for ranks in (1, 2):
                for stage in (1, 2, 3):
                    label = f"{name}, ZeRO-{stage}, {ranks} rank{'s' * (ranks > 1)}"
                    run = f"{name.split()[0]}-{stage}-{ranks}"
                    command = [sys.executable, "-m", "rlhf_ray", "ppo", "configs/tiny/ppo.yaml", *COMMON]
                    command += [f"run.name={run}", f"paths.runs={runs}", f"paths.data={arguments.data.absolute()}"]
                    command += [f"policy.model={model.format(data=arguments.data.absolute())}"]
                    command += [f"policy.learner.learning_rate={learning_rate}", f"steps={arguments.steps}"]
                    command += [f"policy.learner.zero_stage={stage}", f"policy.learner.replicas={ranks}"]
                    subprocess.run(command, timeout=TIMEOUT_S, check=False)
                    log = Path(runs) / run / "metrics.jsonl"
                    rows = [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.exists() else []
                    results = [Result(f"{label}: verified syncs", len(rows), target=f">= {arguments.steps}")]
                    if rows:
                        largest = max(row["sync/max_abs_dlogp"] for row in rows)
                        results.append(Result(f"{label}: largest |Δ log-prob|", largest, "nats", "<= 1e-4 nats"))
                        moved = min(row["sync/change"] for row in rows)
                        results.append(Result(f"{label}: smallest median change in a step", moved, "nats", "> 0 nats"))
                    report.add(results, label)


if __name__ == "__main__":
    main()
