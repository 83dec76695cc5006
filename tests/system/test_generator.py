"""Engine and learner agree on every token, before and after syncs, and a shard can be sampled again bit for bit.

One engine for the whole file, in an actor of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from rlhf_ray.config.settings import ActorSettings, GeneratorSettings, PolicySettings, WeightSettings
from rlhf_ray.failures import FailureKind, RoleFailure
from rlhf_ray.randomness import keyed_seed
from rlhf_ray.roles.deepspeed_engine import Rank
from rlhf_ray.roles.generator import Generator, ShardPlan
from rlhf_ray.roles.policy_learner import PolicyLearner
from rlhf_ray.rollout import FINISH_LENGTH, FINISH_STOP, Rollout, RolloutHeader, TokenColumn
from rlhf_ray.runtime.actor_group import ActorGroup
from rlhf_ray.runtime.learner_group import ranks
from rlhf_ray.runtime.role_host import OneByOne
from rlhf_ray.runtime.waiting import collect
from rlhf_ray.runtime.weight_transfer import ObjectStoreTransport, verify
from tests.making import ALGORITHM, KL_COEFFICIENT, learner_settings, random_rollout, shard_of
from tests.system.groups import started

PARITY = 1e-4
SETTINGS = GeneratorSettings(dtype="float32", kv_cache_gib=0.05, max_concurrent_sequences=32)


class ObservedGenerator(Generator):
    """A generator that also tells how much of a prompt the engine's prefix cache holds."""

    def cached_tokens(self, prompt: Sequence[int]) -> int:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        [output] = self._engine.generate(
            [TokensPrompt(prompt_token_ids=list(prompt))], SamplingParams(max_tokens=1), use_tqdm=False
        )
        return output.num_cached_tokens or 0


@pytest.fixture(scope="module")
def groups(local_ray: Path, policy_model: str, policy_tokenizer: Any) -> Iterator[tuple[ActorGroup, ActorGroup]]:
    """One generator and one policy learner, started together."""
    settings = PolicySettings(model=policy_model, learner=learner_settings())
    with started(local_ray, {"generator": SETTINGS, "policy": ActorSettings()}) as [generators, policy]:
        pending = generators.build(
            ObservedGenerator, [(policy_model, SETTINGS, 224, policy_tokenizer.eos_token_id, "object_store")]
        )
        build = partial(PolicyLearner, total_steps=20)
        pending += policy.build(build, [(settings, ALGORITHM, rank) for rank in ranks(policy)])
        collect(pending, 280)
        yield generators, policy


@pytest.fixture
def generators(groups: tuple[ActorGroup, ActorGroup], policy_model: str, single_rank: Rank) -> ActorGroup:
    """The engine with the first weights."""
    load(groups[0], learner(policy_model, single_rank), 0)
    return groups[0]


def learner(model: str, rank: Rank, temperature: float = 1.0) -> PolicyLearner:
    settings = PolicySettings(model=model, learner=learner_settings())
    algorithm = ALGORITHM.model_copy(update={"minibatches": 2})
    return PolicyLearner(settings, algorithm, rank, total_steps=20, temperature=temperature)


def load(generators: ActorGroup, source: PolicyLearner, version: int) -> None:
    buckets = tuple(ray.put(bucket) for bucket in source.weight_buckets(40_000))
    assert len(buckets) > 2
    generators.call_all("load_weights", OneByOne(buckets), version)


def plan_for(tokenizer: Any, **chosen: Any) -> ShardPlan:
    texts = ["I think the movie was", "They say the song is", "You know the cast", "We found the ending seems"]
    prompts = tuple(np.array(tokenizer(text).input_ids, dtype=np.int32) for text in texts)
    seeds = tuple(keyed_seed(0, "sample", prompt, sample) for prompt in range(4) for sample in range(4))
    plan = ShardPlan(
        index=0,
        prompt_ids=(10, 11, 12, 13),
        prompts=prompts,
        samples_per_prompt=4,
        seeds=seeds,
        temperature=1.0,
        max_response_tokens=24,
    )
    return replace(plan, **chosen)


def generate(generators: ActorGroup, plan: ShardPlan) -> tuple[Rollout, RolloutHeader]:
    return generators.wait(generators.submit(0, "generate", plan, num_returns=2))  # type: ignore[return-value]


def train(policy: PolicyLearner, rollout: Rollout, step: int) -> None:
    policy.train(step, [shard_of(rollout, policy.logprobs(rollout))], KL_COEFFICIENT)


def assert_equal(one: Rollout, other: Rollout) -> None:
    for name, value in vars(one).items():
        assert np.array_equal(value, getattr(other, name)), name


def test_a_rollout_is_what_the_plan_asked_for(generators: ActorGroup, policy_tokenizer: Any):
    plan = plan_for(policy_tokenizer)
    rollout, header = generate(generators, plan)
    assert header == rollout.header()
    assert rollout.prompt_ids.tolist() == np.repeat(plan.prompt_ids, 4).tolist()
    assert rollout.sample_ids.tolist() == list(range(40, 56))
    for index in range(16):
        tokens = rollout.sample_tokens(index)
        prompt, response = np.split(tokens, [rollout.prompt_lengths[index]])
        assert prompt.tolist() == plan.prompts[index // 4].tolist()
        ended = response[-1] == policy_tokenizer.eos_token_id
        assert rollout.finish_reasons[index] == (FINISH_STOP if ended else FINISH_LENGTH)
        assert ended or len(response) == 24
        assert policy_tokenizer.eos_token_id not in response[:-1]
    assert len({rollout.sample_tokens(index).tobytes() for index in range(16)}) == 16


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_engine_and_learner_agree_before_and_after_every_sync(
    generators: ActorGroup, policy_model: str, policy_tokenizer: Any, single_rank: Rank, temperature: float
):
    policy = learner(policy_model, single_rank, temperature)
    plan = plan_for(policy_tokenizer, temperature=temperature)
    rollout, _ = generate(generators, plan)
    assert policy.compare(rollout).max_abs <= PARITY
    for version in (1, 2, 3):
        train(policy, rollout, version)
        stale = policy.compare(rollout)
        assert stale.max_abs > 100 * PARITY, "weights that were not loaded must show"
        load(generators, policy, version)
        rollout, header = generate(generators, plan)
        assert (header.version_min, header.version_max) == (version, version)
        report = policy.compare(rollout)
        assert report.max_abs <= PARITY
        assert report.mean_ratio <= 1 + PARITY


def test_a_learner_at_another_temperature_disagrees(
    generators: ActorGroup, policy_model: str, policy_tokenizer: Any, single_rank: Rank
):
    rollout, _ = generate(generators, plan_for(policy_tokenizer, temperature=0.7))
    assert learner(policy_model, single_rank).compare(rollout).max_abs > 100 * PARITY


def long_prompts(count: int) -> tuple[np.ndarray, ...]:
    """Longer than the blocks of the prefix cache, the first 140 tokens in common."""
    random = np.random.default_rng(0)
    common = random.integers(3, 300, 140)
    return tuple(np.concatenate([common, random.integers(3, 300, 30)]).astype(np.int32) for _ in range(count))


@pytest.mark.parametrize("prompts", ["short", "long"])
def test_a_plan_gives_the_same_rollout_again(generators: ActorGroup, policy_tokenizer: Any, prompts: str):
    """Whatever the engine did in between, and with prompts of which it could have kept a part."""
    plan = plan_for(policy_tokenizer, **({"prompts": long_prompts(4)} if prompts == "long" else {}))
    first, _ = generate(generators, plan)
    generate(generators, plan_for(policy_tokenizer, prompts=plan.prompts[::-1], seeds=plan.seeds[::-1]))
    again, _ = generate(generators, plan)
    assert_equal(first, again)


def test_other_seeds_give_other_responses(generators: ActorGroup, policy_tokenizer: Any):
    plan = plan_for(policy_tokenizer)
    other = replace(plan, seeds=(*plan.seeds[1:], 12345))
    tokens = [generate(generators, each)[0].tokens.tolist() for each in (plan, other)]
    assert tokens[0] != tokens[1]


def test_halves_of_a_shard_are_parts_of_the_whole(generators: ActorGroup, policy_tokenizer: Any):
    plan = plan_for(policy_tokenizer)
    whole, _ = generate(generators, plan)
    halves = [
        replace(
            plan,
            prompt_ids=plan.prompt_ids[part],
            prompts=plan.prompts[part],
            seeds=plan.seeds[part.start * 4 : part.stop * 4],
        )
        for part in (slice(0, 2), slice(2, 4))
    ]
    rollouts = [generate(generators, half)[0] for half in halves]
    for name in ("tokens", "response_lengths", "sample_ids", "finish_reasons", "logprobs"):
        assert np.array_equal(np.concatenate([getattr(each, name) for each in rollouts]), getattr(whole, name)), name


def test_nothing_computed_with_old_weights_survives_a_sync(
    generators: ActorGroup, policy_model: str, policy_tokenizer: Any, single_rank: Rank
):
    [prompt] = long_prompts(1)
    generators.call(0, "cached_tokens", prompt.tolist())
    assert generators.call(0, "cached_tokens", prompt.tolist()) > 0, "the cache is not in use; this proves nothing"
    policy = learner(policy_model, single_rank)
    train(policy, random_rollout(0), 0)
    load(generators, policy, 1)
    assert generators.call(0, "cached_tokens", prompt.tolist()) == 0


def test_a_sync_is_verified(groups: tuple[ActorGroup, ActorGroup], policy_tokenizer: Any):
    """The loop's own check, with learner and engine in their actors."""
    generators, policy = groups
    settings, transport = WeightSettings(), ObjectStoreTransport(policy, generators, bucket_mib=1)
    probe = plan_for(policy_tokenizer, max_response_tokens=8)
    transport.send(5)
    parity = verify(settings, policy, generators, probe, version=5, exact=True)
    assert 0 < parity.max_abs <= PARITY

    with pytest.raises(RoleFailure, match="version 5–5 after a sync to 6") as caught:
        verify(settings, policy, generators, probe, version=6, exact=True)
    assert (caught.value.kind, caught.value.role) == (FailureKind.FATAL, "generator-0")

    rollout = random_rollout(0)
    policy.call_all("train", 0, [shard_of(rollout, TokenColumn(rollout.logprobs))], KL_COEFFICIENT)
    with pytest.raises(RoleFailure, match="disagree after the sync to version 5") as caught:
        verify(settings, policy, generators, probe, version=5, exact=True)
    assert (caught.value.kind, caught.value.role) == (FailureKind.FATAL, "generator-0")
    transport.send(6)
    assert verify(settings, policy, generators, probe, version=6, exact=True).max_abs <= PARITY
