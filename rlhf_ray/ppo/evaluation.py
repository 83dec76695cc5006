"""Held-out prompts, sampled before and after training with the same seeds, scored and judged."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rlhf_ray.config.base import ActorSettings
from rlhf_ray.config.settings import PPOConfig
from rlhf_ray.ppo.inputs import Inputs
from rlhf_ray.reward.core.evaluator import EvaluatedSample
from rlhf_ray.tracking.report import SamplePair
from rlhf_ray.tracking.run_folder import write_atomic


def held_out_summary(
    before: Sequence[EvaluatedSample], after: Sequence[EvaluatedSample]
) -> dict[str, float | int | None]:
    """`held_out` of `summary.json`. Failed scores are left out of the means and counted."""
    rewards_before, rewards_after = _rewards(before), _rewards(after)
    return {
        "prompts": len({sample.prompt_id for sample in after}),
        "vader_before": _mean([sample.judgement for sample in before if sample.judgement is not None]),
        "vader_after": _mean([sample.judgement for sample in after if sample.judgement is not None]),
        "reward_before": _mean(rewards_before),
        "reward_after": _mean(rewards_after),
        "reward_std_before": statistics.pstdev(rewards_before) if rewards_before else None,
        "failures_before": len(before) - len(rewards_before),
        "failures_after": len(after) - len(rewards_after),
        "response_length_before": _mean([float(sample.num_tokens) for sample in before]),
        "response_length_after": _mean([float(sample.num_tokens) for sample in after]),
    }


def held_out_metrics(samples: Sequence[EvaluatedSample]) -> dict[str, float | int | None]:
    """What a judgement in the middle of a run adds to the step's row."""
    return {
        "held_out/reward": _mean(_rewards(samples)),
        "held_out/judge": _mean([sample.judgement for sample in samples if sample.judgement is not None]),
        "held_out/kl": held_out_kl(samples),
        "held_out/length": _mean([float(sample.num_tokens) for sample in samples]),
        "held_out/failures": len(samples) - len(_rewards(samples)),
    }


def held_out_line(summary: Mapping[str, float | int | None]) -> str:
    """The judgement in one line for the terminal."""
    told = []
    for name, key in (("reward", "reward"), ("VADER", "vader")):
        before, after = summary[f"{key}_before"], summary[f"{key}_after"]
        if before is not None and after is not None:
            told.append(f"{name} {before:+.2f} -> {after:+.2f}")
    return f"on {summary['prompts']} held-out prompts: {', '.join(told) or 'no sample has a score'}"


def held_out_kl(samples: Sequence[EvaluatedSample]) -> float | None:
    """Mean over sequences of the summed per-token k1 against the reference, nats."""
    return _mean([sample.kl for sample in samples if sample.kl is not None])


def pair_samples(before: Sequence[EvaluatedSample], after: Sequence[EvaluatedSample]) -> list[SamplePair]:
    """The responses to the same prompts with the same seeds, side by side."""
    later = {sample.sample_id: sample for sample in after}
    return [
        SamplePair(
            prompt=sample.prompt,
            before=sample.response,
            after=later[sample.sample_id].response,
            reward_before=sample.reward,
            reward_after=later[sample.sample_id].reward,
            judge_before=sample.judgement,
            judge_after=later[sample.sample_id].judgement,
        )
        for sample in before
        if sample.sample_id in later
    ]


def before_file(config: PPOConfig, inputs: Inputs) -> str:
    """Name of the file with the samples of the policy as it was before training.

    Named after everything that they follow from: where a run is resumed with another evaluation, policy or reward
    model, those of before are not taken for the new ones.
    """
    assert inputs.held_out is not None, "called with held-out prompts only"
    placement = set(ActorSettings.model_fields)
    follows_from = {
        "policy": config.policy.model,
        "seed": config.run.seed,
        "prompts": [(prompt.text, prompt.token_ids.tolist(), repr(prompt.label)) for prompt in inputs.held_out],
        "samples_per_prompt": config.evaluation.samples_per_prompt,
        "temperature": config.sampling.temperature,
        "max_response_tokens": config.sampling.max_response_tokens,
        "stop": config.sampling.stop,
        "judge": config.evaluation.judge,
        "rewards": [
            source.model_dump(mode="json", exclude={*placement, "token_file", "timeout_s", "on_failure"})
            for source in config.reward
        ],
        "reward_versions": [source.version for source in inputs.rewards],
    }
    key = hashlib.blake2b(json.dumps(follows_from, sort_keys=True).encode(), digest_size=6).hexdigest()
    return f"held_out_before-{key}.jsonl"


def save_samples(path: Path, samples: Sequence[EvaluatedSample]) -> None:
    """One JSON object a sample: what a resumed run compares with in the end."""
    write_atomic(path, "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples))


def load_samples(path: Path) -> list[EvaluatedSample]:
    """What `save_samples` wrote."""
    return [EvaluatedSample(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _rewards(samples: Sequence[EvaluatedSample]) -> list[float]:
    return [sample.reward for sample in samples if sample.reward is not None]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
