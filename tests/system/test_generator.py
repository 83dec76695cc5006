"""Engine and learner agree on every token, before and after syncs, and a shard can be sampled again bit for bit.

One engine for the whole file, in an actor of its own.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from rlhf_ray.algorithms.parity import Parity
from rlhf_ray.config.base import ActorSettings
from rlhf_ray.config.settings import GeneratorSettings, PolicySettings, WeightSettings
from rlhf_ray.failures import FailureKind, RoleFailure
from rlhf_ray.models.buckets import Snapshot, WeightBucket
from rlhf_ray.randomness import keyed_seed
from rlhf_ray.roles.generator import Generator, ShardPlan
from rlhf_ray.roles.policy_learner import PolicyLearner
from rlhf_ray.roles.rank_group import Rank
from rlhf_ray.rollout import FINISH_LENGTH, FINISH_STOP, Rollout, TokenColumn
from rlhf_ray.runtime.actor_group import ActorGroup
from rlhf_ray.runtime.answers import Answer, Assembly, Deferred, OneByOne, collect
from rlhf_ray.runtime.learner_group import ranks
from rlhf_ray.runtime.weight_transfer import WeightSync, probe_rows
from tests.making import ALGORITHM, KL_COEFFICIENT, learner_settings, random_rollout, shard_of
from tests.system.groups import started

PARITY = 1e-4
SETTINGS = GeneratorSettings(dtype="float32", kv_cache_gib=0.05, max_concurrent_sequences=32, shards_in_flight=2)


class ObservedGenerator(Generator):
    """A generator that also tells how much of a prompt the engine's prefix cache holds, and is given new weights after
    so many steps of its engine."""

    _pending: tuple[int, Snapshot] | None = None

    def generate_across(self, plan: ShardPlan, first: Snapshot, second: Snapshot, steps: int) -> Rollout:
        self._pending, self._in_flight = (steps, second), True
        try:
            return self.generate(plan, first)
        finally:
            self._in_flight = False

    def _step(self) -> None:
        super()._step()
        if self._pending is not None:
            left, snapshot = self._pending
            self._pending = (left - 1, snapshot) if left > 1 else None
            if self._pending is None:
                self._bring(snapshot)

    def cached_tokens(self, prompt: Sequence[int]) -> int:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        [output] = self._engine.generate(
            [TokensPrompt(prompt_token_ids=list(prompt))], SamplingParams(max_tokens=1), use_tqdm=False
        )
        return output.num_cached_tokens or 0


@pytest.fixture(scope="module")
def groups(
    local_ray: Path, tied_policy_model: str, policy_tokenizer: Any
) -> Iterator[tuple[ActorGroup[ObservedGenerator], ActorGroup[PolicyLearner]]]:
    """One generator and one policy learner, started together."""
    settings = PolicySettings(model=tied_policy_model, learner=learner_settings())
    with started(local_ray, {"generator": SETTINGS, "policy": ActorSettings()}) as [generators, policy]:
        eos_token_id = policy_tokenizer.eos_token_id
        answers = generators.build(
            partial(ObservedGenerator, tied_policy_model, SETTINGS, 224, eos_token_id, WeightSettings())
        )
        answers += policy.build(
            *(partial(PolicyLearner, settings, ALGORITHM, rank, total_steps=20) for rank in ranks(policy))
        )
        collect(answers, 280)
        yield generators, policy


@dataclass
class Engine:
    """The generator, and the weights that it is to sample with."""

    group: ActorGroup[ObservedGenerator]
    snapshot: Deferred[Snapshot]

    def load(self, learner: PolicyLearner, version: int) -> None:
        """From now on the learner's weights."""
        self.snapshot = snapshot_of(learner, version)

    def generate(self, plan: ShardPlan) -> Rollout:
        return self.group.wait([self.group.of(0).ask(Generator.generate, plan, self.snapshot)])[0]


@pytest.fixture
def engine(
    groups: tuple[ActorGroup[ObservedGenerator], ActorGroup[PolicyLearner]], tied_policy_model: str, single_rank: Rank
) -> Engine:
    """The engine with the first weights, under a version that no other test has used."""
    return Engine(groups[0], snapshot_of(learner(tied_policy_model, single_rank), next(_VERSIONS)))


_VERSIONS = itertools.count(1000)


def learner(model: str, rank: Rank, temperature: float = 1.0) -> PolicyLearner:
    settings = PolicySettings(model=model, learner=learner_settings())
    algorithm = ALGORITHM.model_copy(update={"minibatches": 2})
    return PolicyLearner(settings, algorithm, rank, total_steps=20, temperature=temperature)


def snapshot_of(source: PolicyLearner, version: int) -> Deferred[Snapshot]:
    layout = source.weight_layout(40_000)
    assert len(layout) > 2
    buckets: list[Answer[WeightBucket]] = [
        Answer(ray.put(source.weight_bucket(index)), "policy-0", "here", "weight_bucket")
        for index in range(len(layout))
    ]
    names = frozenset(name for bucket in layout for name in bucket)
    return Assembly(Snapshot, {"version": version, "names": names, "buckets": OneByOne(tuple(buckets))})


def distance(policy: PolicyLearner, rollout: Rollout) -> float:
    """Largest |Δ log-prob| between learner and engine."""
    return float(np.abs(policy.logprobs(rollout).data - rollout.logprobs).max())


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


def train(policy: PolicyLearner, rollout: Rollout, step: int) -> None:
    policy.train(step, [shard_of(rollout, policy.logprobs(rollout))], KL_COEFFICIENT)


def assert_equal(one: Rollout, other: Rollout) -> None:
    for name, value in vars(one).items():
        assert np.array_equal(value, getattr(other, name)), name


def test_a_rollout_is_what_the_plan_asked_for(engine: Engine, policy_tokenizer: Any):
    plan = plan_for(policy_tokenizer)
    rollout = engine.generate(plan)
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
    engine: Engine, tied_policy_model: str, policy_tokenizer: Any, single_rank: Rank, temperature: float
):
    policy = learner(tied_policy_model, single_rank, temperature)
    plan = plan_for(policy_tokenizer, temperature=temperature)
    rollout = engine.generate(plan)
    assert distance(policy, rollout) <= PARITY
    for version in (1, 2, 3):
        train(policy, rollout, version)
        assert distance(policy, rollout) > 100 * PARITY, "weights that were not loaded must show"
        engine.load(policy, version)
        rollout = engine.generate(plan)
        assert set(rollout.policy_versions) == {version}
        assert distance(policy, rollout) <= PARITY


def test_a_learner_at_another_temperature_disagrees(
    engine: Engine, tied_policy_model: str, policy_tokenizer: Any, single_rank: Rank
):
    rollout = engine.generate(plan_for(policy_tokenizer, temperature=0.7))
    assert distance(learner(tied_policy_model, single_rank), rollout) > 100 * PARITY


def long_prompts(count: int) -> tuple[np.ndarray, ...]:
    """Longer than the blocks of the prefix cache, the first 140 tokens in common."""
    random = np.random.default_rng(0)
    common = random.integers(3, 300, 140)
    return tuple(np.concatenate([common, random.integers(3, 300, 30)]).astype(np.int32) for _ in range(count))


@pytest.mark.parametrize("prompts", ["short", "long"])
def test_a_plan_gives_the_same_rollout_again(engine: Engine, policy_tokenizer: Any, prompts: str):
    """Whatever the engine did in between, and with prompts of which it could have kept a part."""
    plan = plan_for(policy_tokenizer, **({"prompts": long_prompts(4)} if prompts == "long" else {}))
    first = engine.generate(plan)
    engine.generate(plan_for(policy_tokenizer, prompts=plan.prompts[::-1], seeds=plan.seeds[::-1]))
    again = engine.generate(plan)
    assert_equal(first, again)


def test_other_seeds_give_other_responses(engine: Engine, policy_tokenizer: Any):
    plan = plan_for(policy_tokenizer)
    other = replace(plan, seeds=(*plan.seeds[1:], 12345))
    tokens = [engine.generate(each).tokens.tolist() for each in (plan, other)]
    assert tokens[0] != tokens[1]


def test_halves_of_a_shard_are_parts_of_the_whole(engine: Engine, policy_tokenizer: Any):
    plan = plan_for(policy_tokenizer)
    whole = engine.generate(plan)
    halves = [
        replace(
            plan,
            prompt_ids=plan.prompt_ids[part],
            prompts=plan.prompts[part],
            seeds=plan.seeds[part.start * 4 : part.stop * 4],
        )
        for part in (slice(0, 2), slice(2, 4))
    ]
    rollouts = [engine.generate(half) for half in halves]
    for name in ("tokens", "response_lengths", "sample_ids", "finish_reasons", "logprobs"):
        assert np.array_equal(np.concatenate([getattr(each, name) for each in rollouts]), getattr(whole, name)), name


def test_shards_in_flight_are_those_sampled_alone(engine: Engine, policy_tokenizer: Any):
    """Two calls share the engine; neither sees the other, and a third with other weights waits for both.

    Many times, since all bring the same references: one that ended while the next began could make Ray forget them.
    """
    plans = [plan_for(policy_tokenizer), plan_for(policy_tokenizer, prompts=long_prompts(4), prompt_ids=(1, 2, 3, 4))]
    alone = [engine.generate(plan) for plan in plans]
    replica = engine.group.of(0)
    for _ in range(10):
        other = replace_version(engine.snapshot, next(_VERSIONS))
        asked = [replica.ask(Generator.generate, plan, engine.snapshot) for plan in plans]
        asked.append(replica.ask(Generator.generate, plans[0], other))
        together = engine.group.wait(asked)
        for one, both in zip(alone, together, strict=False):
            assert_equal(one, both)
        assert set(together[2].policy_versions) == {other.fields["version"]}
        assert np.array_equal(together[2].logprobs, alone[0].logprobs)


def replace_version(snapshot: Deferred[Snapshot], version: int) -> Assembly[Snapshot]:
    assert isinstance(snapshot, Assembly)
    return Assembly(Snapshot, {**snapshot.fields, "version": version})


def test_nothing_computed_with_old_weights_survives_a_sync(
    engine: Engine, tied_policy_model: str, policy_tokenizer: Any, single_rank: Rank
):
    [prompt] = long_prompts(1)

    def cached() -> int:
        return engine.group.wait([engine.group.of(0).ask(ObservedGenerator.cached_tokens, prompt.tolist())])[0]

    cached()
    assert cached() > 0, "the cache is not in use; this proves nothing"
    policy = learner(tied_policy_model, single_rank)
    train(policy, random_rollout(0), 0)
    engine.load(policy, 1)
    engine.generate(plan_for(policy_tokenizer))
    assert cached() == 0


def test_a_sync_is_verified(
    groups: tuple[ActorGroup[ObservedGenerator], ActorGroup[PolicyLearner]], policy_tokenizer: Any
):
    """The loop's own check, with learner and engine in their actors."""
    generators, policy = groups
    prompts = plan_for(policy_tokenizer).prompts
    sync = WeightSync(policy, generators, WeightSettings(bucket_mib=1), 1, probe_rows(prompts, 128, 224), 120)

    def synchronized(version: int) -> Parity:
        begun = sync.begin(version)
        return begun.worst(collect(begun.all_answers(), 120))

    def trained(step: int) -> None:
        rollout = random_rollout(0)
        shards = [shard_of(rollout, TokenColumn(rollout.logprobs))]
        collect([rank.ask(PolicyLearner.train, step, shards, KL_COEFFICIENT) for rank in policy], 120)

    parity = synchronized(0)
    assert (parity.version, parity.first_fault) == (0, "")
    assert 0 < parity.max_abs <= PARITY
    trained(0)
    first = sync.begin(1)
    parity = first.worst(collect(first.all_answers(), 120))
    assert parity.first_fault == ""
    assert parity.change > 1e-3
    assert parity.residual <= 1e-6 < parity.change
    [again] = collect([generators.of(0).ask(Generator.load, first.snapshot)], 60)
    assert again.parity == parity, "it has them already"

    # The learner goes on, and the engine is sent the weights of before in place of the new ones.
    trained(1)
    second = sync.begin(2)
    assert isinstance(first.snapshot, Assembly)
    assert isinstance(second.snapshot, Assembly)
    stale = Assembly(Snapshot, {**second.snapshot.fields, "buckets": first.snapshot.fields["buckets"]})
    collect(second.all_answers(), 120)
    assert synchronized(3).version == 3
    with pytest.raises(RoleFailure, match=r"disagree after 2 syncs to version 2: .*max_abs_dlogp_float32") as caught:
        collect([generators.of(0).ask(Generator.load, stale)], 60)
    assert (caught.value.kind, caught.value.role) == (FailureKind.FATAL, "generator-0")
    assert not collect([generators.of(0).ask(Generator.load, second.snapshot)], 60)[0].parity.fault


def test_every_token_of_a_response_is_of_the_version_that_it_names(
    engine: Engine, policy_tokenizer: Any, tied_policy_model: str, single_rank: Rank
):
    """New weights between two steps of the engine; log-probs of each version, token by token."""
    old, new = learner(tied_policy_model, single_rank), learner(tied_policy_model, single_rank)
    for step in range(3):
        train(new, random_rollout(step), step)
    plan = plan_for(policy_tokenizer, max_response_tokens=48)
    versions = next(_VERSIONS), next(_VERSIONS)
    first, second = (snapshot_of(policy, version) for policy, version in zip((old, new), versions, strict=True))
    across = engine.group.of(0).ask(ObservedGenerator.generate_across, plan, first, second, 20)
    [rollout] = collect([across], 120)
    of_new = rollout.policy_versions == versions[1]
    assert set(rollout.policy_versions.tolist()) == set(versions)
    by_sample = np.split(of_new, rollout.response_starts()[1:-1])
    assert all((np.diff(sample.astype(int)) >= 0).all() for sample in by_sample), "never an old token after a new one"
    assert sum(sample.any() and not sample.all() for sample in by_sample) >= 8, "responses that span the update"
    logprobs = np.stack([policy.logprobs(rollout).data for policy in (old, new)])
    named = np.where(of_new, logprobs[1], logprobs[0])
    assert np.abs(named - rollout.logprobs).max() <= PARITY
    other = np.where(of_new, logprobs[0], logprobs[1])
    assert np.median(np.abs(other - rollout.logprobs)) > 10 * PARITY, "the versions can be told apart"


def test_an_engine_that_has_nothing_to_load_says_so(engine: Engine, policy_tokenizer: Any):
    nothing = Assembly(Snapshot, {"version": 77, "names": frozenset(), "buckets": ()})
    with pytest.raises(RoleFailure, match="nothing to load version 77 from") as caught:
        Engine(engine.group, nothing).generate(plan_for(policy_tokenizer))
    assert (caught.value.kind, caught.value.role) == (FailureKind.INFRASTRUCTURE, "generator-0")
