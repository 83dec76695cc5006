"""ZeRO-1, 2 and 3 on two ranks give what one process gives, and go on from a checkpoint bit for bit."""

import ipaddress
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from ray._raylet import AuthenticationMode, get_authentication_mode

from rlhf_ray.config.base import ActorSettings
from rlhf_ray.config.lora import LoraSettings
from rlhf_ray.config.reward import RewardSettings
from rlhf_ray.config.reward_model import RewardTrainingSettings
from rlhf_ray.config.settings import CriticSettings, PolicySettings, ReferenceSettings
from rlhf_ray.models.buckets import WeightBucket
from rlhf_ray.ppo.export import export_policy
from rlhf_ray.ppo.scoring import rank_scorer
from rlhf_ray.reward.core.protocol import Conversation
from rlhf_ray.reward.core.scorer import RewardScorer
from rlhf_ray.reward.core.source import RewardSource
from rlhf_ray.reward.train.learner import RewardLearner
from rlhf_ray.roles.critic_learner import CriticLearner, CriticReport
from rlhf_ray.roles.deepspeed_engine import DeepSpeedEngine
from rlhf_ray.roles.policy_learner import PolicyLearner, PolicyReport
from rlhf_ray.roles.rank_group import Rank
from rlhf_ray.roles.reference import Reference
from rlhf_ray.rollout import RewardColumn, TokenColumn, TrunkColumn
from rlhf_ray.runtime.actor_group import ActorGroup
from rlhf_ray.runtime.learner_group import ranks
from tests import making
from tests.making import (
    HIDDEN_SIZE,
    KL_COEFFICIENT,
    largest_difference,
    learner_settings,
    random_rollout,
    rounding,
    shard_of,
    weights_in,
)
from tests.system.groups import started
from tests.unit.test_learner import Weighted
from tests.unit.test_reward_learner import LAYOUT as REWARD_LAYOUT
from tests.unit.test_reward_learner import pairs_of

ROLLOUTS = [random_rollout(index) for index in range(4)]
ALGORITHM = making.ALGORITHM.model_copy(update={"minibatches": 2})


class Learners:
    """Policy and critic in one process, each rank with its part of the rollouts."""

    def __init__(self, model: str, rank: Rank, zero_stage: int) -> None:
        settings = learner_settings(
            zero_stage=zero_stage,
            micro_batch_tokens=48,
            weight_decay=0.01,
            # As every configuration for GPUs has it; the result must not depend on it.
            gradient_checkpointing=zero_stage == 3,
        )
        policy, critic = PolicySettings(model=model, learner=settings), CriticSettings(learner=settings)
        self.policy = PolicyLearner(policy, ALGORITHM, rank, total_steps=20)
        self.critic = CriticLearner(critic, model, ALGORITHM, rank, total_steps=20, max_response_tokens=16, seed=0)
        self._rollouts = ROLLOUTS[rank.rank :: rank.world_size]

    def values_are_zero(self) -> bool:
        return not any(self.critic.values(rollout).data.any() for rollout in self._rollouts)

    def train(self, step: int) -> tuple[PolicyReport, CriticReport]:
        shards = [
            shard_of(rollout, self.policy.logprobs(rollout), self.critic.values(rollout)) for rollout in self._rollouts
        ]
        return self.policy.train(step, shards, KL_COEFFICIENT), self.critic.train(step, shards, KL_COEFFICIENT)

    def save(self, folder: str) -> None:
        self.policy.save_checkpoint(folder)
        self.critic.save_checkpoint(folder)

    def load(self, folder: str) -> None:
        self.policy.load_checkpoint(folder)
        self.critic.load_checkpoint(folder)

    def export(self, folder: str) -> list[WeightBucket]:
        """The policy as a directory, the critic's weights as they are."""
        self.policy.export(folder)
        return [WeightBucket.of((name, tensor.clone()) for name, tensor in self.critic._engine.full_weights(""))]


class Adapted:
    """A policy with adapters, each rank with its part of the rollouts."""

    def __init__(self, model: str, rank: Rank, zero_stage: int) -> None:
        policy = PolicySettings(
            model=model,
            learner=learner_settings(zero_stage=zero_stage, micro_batch_tokens=48, gradient_checkpointing=True),
            lora=LoraSettings(rank=4, target_modules=["q_proj", "down_proj"]),
        )
        self.policy = PolicyLearner(policy, ALGORITHM, rank, total_steps=20)
        self._rollouts = ROLLOUTS[rank.rank :: rank.world_size]

    def step(self, step: int) -> tuple[PolicyReport, list[TokenColumn]]:
        """A step of PPO, and the reference's log-probs after it."""
        shards = [shard_of(rollout, self.policy.logprobs(rollout)) for rollout in self._rollouts]
        report = self.policy.train(step, shards, KL_COEFFICIENT)
        return report, [self.policy.reference_logprobs(rollout) for rollout in self._rollouts]

    def weights(self, folder: str) -> list[WeightBucket | None]:
        """What the engine gets; the adapters are written."""
        self.policy.export_adapters(folder)
        return [self.policy.weight_bucket(index) for index in range(len(self.policy.weight_layout(20_000)))]


class Sum:
    """A learner whose gradient is what it is given, in bfloat16."""

    def __init__(self, rank: Rank, zero_stage: int) -> None:
        settings = learner_settings(zero_stage=zero_stage, dtype="bfloat16", max_grad_norm=100.0)
        self._engine = DeepSpeedEngine(Weighted, settings, rank, "bfloat16", 20)

    def grad_norm(self, gradients: list[float]) -> float:
        return self._engine.optimizer_step(gradients, lambda value, _: self._engine.module(value)).grad_norm


def tensors_of(folder: Path, critic: list[WeightBucket]) -> dict[str, torch.Tensor]:
    tensors = {f"policy.{name}": tensor for name, tensor in weights_in(folder).items()}
    return tensors | {f"critic.{name}": tensor.clone() for bucket in critic for name, tensor in bucket.tensors()}


@pytest.fixture(scope="module")
def expected(tied_policy_model: str, single_rank: Rank, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Reports and weights of two steps in one process."""
    learners = Learners(tied_policy_model, single_rank, zero_stage=1)
    reports = [learners.train(step) for step in range(2)]
    folder = tmp_path_factory.mktemp("single")
    return reports, tensors_of(folder, learners.export(str(folder)))


@pytest.fixture(scope="module")
def pair(local_ray: Path) -> Iterator[ActorGroup[Any]]:
    """Two empty processes; each test builds its learners in them."""
    with started(local_ray, {"learner": ActorSettings(replicas=2)}) as [group]:
        yield group


def check_reports(found: list[tuple[PolicyReport, CriticReport]], wanted: tuple[PolicyReport, CriticReport]) -> None:
    policy, critic = wanted
    for own_policy, own_critic in found:
        for name in ("loss", "grad_norm", "entropy", "clip_fraction", "approx_kl", "max_abs_log_ratio"):
            assert getattr(own_policy, name) == pytest.approx(getattr(policy, name), abs=1e-5), name
        for name in ("loss", "grad_norm", "clip_fraction", "explained_variance", "return_mean"):
            assert getattr(own_critic, name) == pytest.approx(getattr(critic, name), abs=1e-5), name
        assert own_policy.stats.shaped_reward_mean == pytest.approx(policy.stats.shaped_reward_mean)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_two_ranks_equal_one_process(
    pair: ActorGroup[Any], tied_policy_model: str, expected: Any, single_rank: Rank, tmp_path: Path, zero_stage: int
):
    places = ranks(pair)

    def build() -> None:
        pair.build_all(*(partial(Learners, tied_policy_model, place, zero_stage) for place in places))

    build()
    assert pair.call_all(Learners.values_are_zero) == [True, True]
    reports = [pair.call_all(Learners.train, 0)]
    pair.call_all(Learners.save, str(tmp_path / "checkpoint"))
    reports.append(pair.call_all(Learners.train, 1))
    critic = pair.call_all(Learners.export, str(tmp_path / "policy"))[0]
    weights = tensors_of(tmp_path / "policy", critic)
    # Nor does a directory of the policy need its ranks.
    pair.call_all(Learners.save, str(tmp_path / "last"))
    export_policy(PolicySettings(model=tied_policy_model), tmp_path / "last", tmp_path / "exported")
    assert largest_difference(weights_in(tmp_path / "exported"), weights_in(tmp_path / "policy")) == 0

    single_reports, single_weights = expected
    for of_ranks, expected_reports in zip(reports, single_reports, strict=True):
        check_reports(of_ranks, expected_reports)
    assert largest_difference(weights, single_weights) <= 1e-5

    # Another layout: one process takes up what two ranks have written.
    single = Learners(tied_policy_model, single_rank, zero_stage=1)
    single.load(str(tmp_path / "checkpoint"))
    check_reports([single.train(1)], single_reports[1])
    alone = tensors_of(tmp_path / "alone", single.export(str(tmp_path / "alone")))
    assert largest_difference(alone, single_weights) <= 1e-5

    build()
    pair.call_all(Learners.load, str(tmp_path / "checkpoint"))
    assert pair.call_all(Learners.train, 1) == reports[1]
    again = tensors_of(tmp_path / "again", pair.call_all(Learners.export, str(tmp_path / "again"))[0])
    assert largest_difference(again, weights) == 0


@pytest.mark.parametrize("stages", [(1, 3), (3, 2), (2, 1)])
def test_a_checkpoint_serves_other_ranks_and_stages(
    pair: ActorGroup[Any], tied_policy_model: str, expected: Any, single_rank: Rank, tmp_path: Path,
    stages: tuple[int, int],
):  # fmt: skip
    """One process writes it, two ranks take it up and write theirs, and two of another stage go on."""
    single = Learners(tied_policy_model, single_rank, zero_stage=1)
    single.train(0)
    single.save(str(tmp_path / "first"))
    places = ranks(pair)
    for folder, stage in zip(("first", "second"), stages, strict=True):
        pair.build_all(*(partial(Learners, tied_policy_model, place, stage) for place in places))
        pair.call_all(Learners.load, str(tmp_path / folder))
        pair.call_all(Learners.save, str(tmp_path / "second"))
        assert not list((tmp_path / folder).glob(".*")), "what was made on the way is gone"
    single_reports, single_weights = expected
    check_reports(pair.call_all(Learners.train, 1), single_reports[1])
    weights = tensors_of(tmp_path / "policy", pair.call_all(Learners.export, str(tmp_path / "policy"))[0])
    assert largest_difference(weights, single_weights) <= 1e-5


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_adapters_of_two_ranks_equal_those_of_one_process(
    pair: ActorGroup[Any], policy_model: str, single_rank: Rank, tmp_path: Path, zero_stage: int
):
    single = Adapted(policy_model, single_rank, 1)
    reference = [single.policy.reference_logprobs(rollout).data for rollout in ROLLOUTS]
    pair.build_all(*(partial(Adapted, policy_model, place, zero_stage) for place in ranks(pair)))
    for step in range(2):
        expected, _ = single.step(step)
        for number, (report, columns) in enumerate(pair.call_all(Adapted.step, step)):
            assert report.loss == pytest.approx(expected.loss, abs=1e-5)
            assert report.grad_norm == pytest.approx(expected.grad_norm, abs=1e-5)
            for own, base in zip(columns, reference[number::2], strict=True):
                np.testing.assert_allclose(own.data, base, rtol=0, atol=1e-5)
    of_ranks = pair.call_all(Adapted.weights, str(tmp_path / "ranks"))
    assert of_ranks[1] == [None] * len(of_ranks[0])
    found, wanted = (
        {name: tensor.clone() for bucket in buckets if bucket is not None for name, tensor in bucket.tensors()}
        for buckets in (of_ranks[0], single.weights(str(tmp_path / "single")))
    )
    assert largest_difference(found, wanted) <= 1e-5
    adapters = [weights_in(tmp_path / name, "adapter_model.safetensors") for name in ("ranks", "single")]
    assert largest_difference(*adapters) <= 1e-5


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bfloat16_gradients_of_two_ranks_add_up_in_float32(pair: ActorGroup[Any], zero_stage: int):
    """In bfloat16, 1 + 2⁻⁹ is 1."""
    pair.build_all(*(partial(Sum, place, zero_stage) for place in ranks(pair)))
    gradients = ([1.0, 0.0], [2.0**-9] * 2)
    found = pair.wait([rank.ask(Sum.grad_norm, own) for rank, own in zip(pair, gradients, strict=True)])
    assert found == pytest.approx([2 * (1 + 2 * 2.0**-9)] * 2, rel=1e-12)


def test_nothing_listens_beyond_loopback(pair: ActorGroup[Any]):
    """Neither Ray nor the ranks' own meeting point."""
    pair.build_all(*(partial(Sum, place, 1) for place in ranks(pair)))
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = {
        (process.name(), connection.laddr.ip.removeprefix("::ffff:"))
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {"gcs_server", "raylet"} <= {name for name, _ in listening}
    assert ray.get_runtime_context().gcs_address.startswith("127.0.0.1:")
    assert get_authentication_mode() == AuthenticationMode.TOKEN
    assert Path("~/.ray/auth_token").expanduser().stat().st_mode & 0o077 == 0, "the token is its owner's alone"
    assert [each for each in sorted(listening) if not ipaddress.ip_address(each[1]).is_loopback] == []


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "adapters"])
def test_a_reward_model_of_two_ranks_equals_that_of_one_process(
    pair: ActorGroup[Any], tiny: Path, single_rank: Rank, tmp_path: Path, zero_stage: int, adapters: bool
):
    """Five pairs on two ranks: one has more micro-batches than the other, and every pass is a collective."""
    model = str(tiny / "reward_model")
    pairs = pairs_of(REWARD_LAYOUT)
    training = RewardTrainingSettings(lora=LoraSettings(rank=4) if adapters else None)
    settings = learner_settings(zero_stage=zero_stage, micro_batch_tokens=24)
    texts = [each.chosen for each in pairs]

    def arguments(place: Rank) -> tuple[Any, ...]:
        return model, settings, training, REWARD_LAYOUT, place, 10, 0

    single = RewardLearner(*arguments(single_rank))
    pair.build_all(*(partial(RewardLearner, *arguments(place)) for place in ranks(pair)))
    for _ in range(2):
        expected = single.train_pairs(pairs)
        shares = (pairs[0::2], pairs[1::2])
        found = pair.wait([rank.ask(RewardLearner.train_pairs, own) for rank, own in zip(pair, shares, strict=True)])
        for report in found:
            assert report.loss == pytest.approx(expected.loss, abs=1e-5)
            assert report.grad_norm == pytest.approx(expected.grad_norm, abs=1e-5)
            assert report.tokens == expected.tokens
    scores = pair.call_all(RewardLearner.score_tokens, texts)
    np.testing.assert_allclose(scores[0], single.score_tokens(texts), rtol=0, atol=1e-5)
    single.export(str(tmp_path / "single"))
    pair.call_all(RewardLearner.export, str(tmp_path / "ranks"))
    assert largest_difference(weights_in(tmp_path / "ranks"), weights_in(tmp_path / "single")) <= 1e-5


class ScoringRank:
    """One rank of a sharded reward model, with its part of the rollouts; the second has one more, of nothing."""

    def __init__(self, make: partial[Any], rank: Rank) -> None:
        self._scorer, self._rank = make(rank=rank), rank

    def columns(self, prompts: dict[int, Conversation]) -> list[RewardColumn]:
        return [self._scorer.score(rollout, prompts) for rollout in ROLLOUTS[self._rank.rank :: 2]]

    def texts(self, texts: list[list[list[int]]]) -> Any:
        """Scores of this rank's texts, of which there may be none."""
        return self._scorer._scorer.score_tokens(texts[self._rank.rank]).scores

    def share_of_weights(self) -> float:
        return share_of(self._scorer._scorer._networks[0].module.parameters())


def test_a_sharded_reward_model_scores_as_a_whole_one(pair: ActorGroup[Any], tiny: Path):
    policy = str(tiny / "policy")
    settings = RewardSettings(model=str(tiny / "reward_model"), sharded=True, replicas=2, batch_size=4)
    make = partial(rank_scorer, RewardSource.read(settings), policy)
    pair.build_all(*(partial(ScoringRank, make, place) for place in ranks(pair)))
    # Later DeepSpeed keeps tensors of up to 100,000 entries, and this model has no others.
    for share in pair.call_all(ScoringRank.share_of_weights):
        assert share == pytest.approx(0.5, abs=0.01)
    whole = RewardScorer(settings, policy)
    prompts = {number: Conversation(f"of {number}") for number in range(20)}
    of_ranks = pair.call_all(ScoringRank.columns, prompts)
    for index, rollout in enumerate(ROLLOUTS):
        expected = whole.score(rollout, prompts)
        np.testing.assert_allclose(of_ranks[index % 2][index // 2].scores, expected.scores, rtol=0, atol=1e-5)
    # Twelve texts in three passes on the one rank, and none on the other, which goes along.
    texts = [[[5 + index] * (3 + index) for index in range(12)], []]
    scored, nothing = pair.call_all(ScoringRank.texts, texts)
    np.testing.assert_allclose(scored, whole.score_tokens(texts[0]).scores, rtol=0, atol=1e-5)
    assert len(nothing) == 0


def share_of(parameters: Iterable[Any]) -> float:
    """Of all parameters' entries, those that this process holds between two passes."""
    each = list(parameters)
    return sum(one.numel() + one.ds_tensor.numel() for one in each) / sum(one.ds_numel for one in each)


class FrozenRank:
    """One rank of a sharded reference, with its part of the rollouts."""

    def __init__(self, reference: partial[Reference], rank: Rank) -> None:
        self._reference = reference(rank=rank)
        self._rollouts = ROLLOUTS[rank.rank :: rank.world_size]

    def columns(self) -> list[tuple[TrunkColumn, TokenColumn, TokenColumn]]:
        """In turn, as a run asks for them: states, log-probs behind them, log-probs from the first layer on."""
        found = []
        for rollout in self._rollouts:
            trunk = self._reference.trunk(rollout)
            found.append((trunk, self._reference.logprobs(rollout, trunk), self._reference.logprobs(rollout)))
        return found

    def share_of_weights(self) -> float:
        return share_of(self._reference._model.parameters())


@pytest.mark.parametrize(("micro_batch_tokens", "tolerance"), [(48, 0.0), (40, rounding(HIDDEN_SIZE))])
def test_a_sharded_reference_says_what_a_whole_one_says(
    pair: ActorGroup[Any], tied_policy_model: str, micro_batch_tokens: int, tolerance: float
):
    """Bit-for-bit where both ranks have as many packs (48), which are then those of a model that is whole. With 40,
    one rank needs two packs and the other one: it cuts smaller ones, and only the order of sums differs."""
    settings = ReferenceSettings(dtype="float32", micro_batch_tokens=micro_batch_tokens, sharded=True, replicas=2)
    reference = partial(Reference, tied_policy_model, settings, 0.7, 1)
    pair.build_all(*(partial(FrozenRank, reference, place) for place in ranks(pair)))
    whole = reference()
    of_ranks = pair.call_all(FrozenRank.columns)
    for index, rollout in enumerate(ROLLOUTS):
        found = of_ranks[index % 2][index // 2]
        trunk = whole.trunk(rollout)
        expected = (trunk, whole.logprobs(rollout, trunk), whole.logprobs(rollout))
        for own, alone in zip(found, expected, strict=True):
            np.testing.assert_allclose(own.data, alone.data, rtol=0, atol=tolerance)
    for share in pair.call_all(FrozenRank.share_of_weights):
        assert share == pytest.approx(0.5, abs=0.01)
