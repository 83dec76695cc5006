"""Samples of a policy from real engines: the same from one as from two, and a reward model judged on them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_ray.config.reward import RewardSettings
from rlhf_ray.config.reward_model import BestOfNSettings
from rlhf_ray.config.settings import ClusterSettings, GeneratorSettings, PromptSettings
from rlhf_ray.failures import BadInput
from rlhf_ray.reward.core.scorer import RewardScorer
from rlhf_ray.reward.judge.policy_samples import (
    PolicySamples,
    judge_samples,
    read_policy,
    report_best_of_n,
    sample_policy,
    score_samples,
)
from tests.making import SCORE_ROUNDING
from tests.system.groups import tracked

CLUSTER = ClusterSettings(placement_timeout_s=60, start_timeout_s=280, call_timeout_s=120)
NUM_PROMPTS, NUM_SAMPLES = 5, 4


def settings_for(tiny: Path, replicas: int, policy: str = "policy") -> BestOfNSettings:
    return BestOfNSettings(
        policy=str(tiny / policy),
        # Two prompts a shard, the last shard with one.
        generator=GeneratorSettings(
            dtype="float32", kv_cache_gib=0.05, max_concurrent_sequences=8, replicas=replicas, cpus=0.5
        ),
        prompts=PromptSettings(path=str(tiny / "prompts_test.jsonl"), limit=NUM_PROMPTS),
        samples_per_prompt=NUM_SAMPLES,
        judge="vader",
        max_response_tokens=12,
    )


def samples_of(tiny: Path, replicas: int, runs: Path) -> PolicySamples:
    with tracked(runs) as tracker:
        return sample_policy(read_policy(settings_for(tiny, replicas)), CLUSTER, 3, tracker)


@pytest.fixture(scope="module")
def samples(local_ray: Path, tiny: Path) -> PolicySamples:
    """Of two engines."""
    return samples_of(tiny, 2, local_ray / "two")


def test_every_prompt_has_its_responses(samples: PolicySamples, tiny: Path, policy_tokenizer: Any):
    lines = (tiny / "prompts_test.jsonl").read_text().splitlines()[:NUM_PROMPTS]
    assert [prompt.text for prompt in samples.prompts] == [json.loads(line)["prompt"] for line in lines]
    assert [len(responses) for responses in samples.responses] == [NUM_SAMPLES] * NUM_PROMPTS
    texts = [response for responses in samples.responses for response in responses]
    assert len(set(texts)) > NUM_SAMPLES
    assert not any(token in text for token in policy_tokenizer.all_special_tokens for text in texts)
    assert samples.truncated_share is not None
    assert 0 <= samples.truncated_share <= 1


def test_the_number_of_engines_changes_nothing(samples: PolicySamples, local_ray: Path, tiny: Path):
    one = samples_of(tiny, 1, local_ray / "one")
    assert one.responses == samples.responses
    assert one.truncated_share == samples.truncated_share


def test_a_reward_model_is_judged_on_them(samples: PolicySamples, tiny: Path):
    scorer = RewardScorer(RewardSettings(model=str(tiny / "reward_model")))
    scores = score_samples(samples, scorer.texts, lambda encoded, _: scorer.score_encoded(encoded).scores)
    first = scorer.score_texts([samples.prompts[1].text + samples.responses[1][2]]).scores[0]
    assert scores[1, 2] == pytest.approx(first, abs=SCORE_ROUNDING)
    report = report_best_of_n(scores, judge_samples(samples, "vader"), "vader")
    assert (report.prompts, report.samples_per_prompt, report.failed_prompts) == (NUM_PROMPTS, NUM_SAMPLES, 0)
    proxy = [point.proxy for point in report.curve.points]
    assert np.all(np.diff(proxy) > 0)
    assert report.spread.within_prompt_std > 0
    json.dumps(asdict(report), allow_nan=False)


def test_a_reward_model_is_no_policy(tiny: Path):
    with pytest.raises(BadInput, match="SequenceClassification") as caught:
        read_policy(settings_for(tiny, replicas=1, policy="reward_model"))
    assert caught.value.where == "best_of_n.policy"
