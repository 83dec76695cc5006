"""What the reward model's learner minimises, with heads, attributes and adapters, whatever the micro-batches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rlhf_ray.config.lora import LoraSettings
from rlhf_ray.config.reward_model import RewardTrainingSettings
from rlhf_ray.reward.core.card import MemberLayout
from rlhf_ray.reward.core.loading import head_hash
from rlhf_ray.reward.train.learner import RewardLearner
from rlhf_ray.reward.train.pairs import EncodedPair
from rlhf_ray.roles.rank_group import Rank
from tests.making import SCORE_ROUNDING, largest_difference, learner_settings, parameters_of, weights_in

TOTAL_STEPS = 20
LAYOUT = MemberLayout(attributes=("preference", "helpfulness", "safety"), heads=2)


def pairs_of(layout: MemberLayout) -> list[EncodedPair]:
    """Five pairs of uneven length; the last attribute is missing in every other one."""
    random = np.random.default_rng(3)
    return [
        EncodedPair(
            chosen=tuple(random.integers(3, 300, 3 + 4 * index).tolist()),
            rejected=tuple(random.integers(3, 300, 17 - 3 * index).tolist()),
            probabilities=(0.9, *(0.0 if index % 2 else None for _ in layout.attributes[1:])),
            margin=0.5 if index == 2 else None,
            weight=1.0 + index,
            member_weights=tuple(float((index + head) % 3) for head in range(layout.heads)),
        )
        for index in range(5)
    ]


PLAIN = MemberLayout()
PAIRS = [
    EncodedPair(pair.chosen, pair.rejected, pair.probabilities, None, pair.weight, (1.0,)) for pair in pairs_of(PLAIN)
]


def reward_learner(
    model: str,
    rank: Rank,
    layout: MemberLayout = PLAIN,
    training: RewardTrainingSettings | None = None,
    **settings: Any,
) -> RewardLearner:
    training = training or RewardTrainingSettings()
    return RewardLearner(model, learner_settings(**settings), training, layout, rank, TOTAL_STEPS, seed=0)


def trained(learner: RewardLearner) -> dict[str, torch.Tensor]:
    return {name.removeprefix("network."): tensor for name, tensor in parameters_of(learner._engine.unwrapped).items()}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory, policy_tokenizer: Any) -> str:
    """A directory with a small BERT; its tokenizer is the policy's."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(policy_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
        num_labels=1,
    )
    folder = tmp_path_factory.mktemp("bert")
    BertForSequenceClassification(config).save_pretrained(folder)
    policy_tokenizer.save_pretrained(folder)
    return str(folder)


def test_encoder_reward_model_trains_exactly_its_top_layers(bert: str, single_rank: Rank):
    learner = reward_learner(bert, single_rank, trainable_top_layers=1)
    before = trained(learner)
    for _ in range(2):
        learner.train_pairs(PAIRS)
    changed = {name for name, tensor in trained(learner).items() if not torch.equal(tensor, before[name])}
    top = {name for name in before if name.startswith(("bert.encoder.layer.2.", "bert.pooler.", "classifier."))}
    # A key's bias adds the same to every attention score of a query, so its gradient is nothing but rounding; and
    # a bias of the score cancels in the difference, but not in the centring.
    assert top - changed <= {"bert.encoder.layer.2.attention.self.key.bias"}
    assert changed <= top


def test_reward_model_learns_its_pairs(bert: str, single_rank: Rank):
    learner = reward_learner(bert, single_rank)
    first = learner.train_pairs(PAIRS)
    for _ in range(8):
        last = learner.train_pairs(PAIRS)
    assert last.loss < first.loss
    chosen, rejected = (
        learner.score_tokens(side) for side in zip(*((p.chosen, p.rejected) for p in PAIRS), strict=True)
    )
    assert (chosen > rejected).all()


def expected_loss(learner: RewardLearner, pairs: list[EncodedPair], layout: MemberLayout, centering: float) -> float:
    """The loss written out, one text at a time, in float64."""
    network = learner._engine.unwrapped
    network.network.set_attn_implementation("eager")
    shape = (len(layout.attributes), layout.heads)

    def score(ids: tuple[int, ...]) -> torch.Tensor:
        with torch.no_grad():
            return network.network(input_ids=torch.tensor([ids])).logits[0].double().view(shape)

    total = 0.0
    for attribute in range(shape[0]):
        weight = sum(pair.weight for pair in pairs)
        for pair in pairs:
            label = pair.probabilities[attribute]
            if label is None:
                continue
            chosen, rejected = score(pair.chosen)[attribute], score(pair.rejected)[attribute]
            gap, margin = chosen - rejected, (pair.margin or 0.0) if attribute == 0 else 0.0
            entropy = -(label * F.logsigmoid(gap - margin) + (1 - label) * F.logsigmoid(-gap - margin))
            own = torch.tensor(pair.member_weights).double() * (entropy + centering * (chosen + rejected).square())
            total += float(own.sum()) * pair.weight / weight / layout.heads
    return total


def test_loss_is_summed_over_attributes_and_averaged_over_heads(bert: str, single_rank: Rank):
    pairs = pairs_of(LAYOUT)
    learner = reward_learner(bert, single_rank, LAYOUT, RewardTrainingSettings(centering=0.3))
    report = learner.train_pairs(pairs)
    fresh = reward_learner(bert, single_rank, LAYOUT)
    expected = expected_loss(fresh, pairs, LAYOUT, 0.3)
    assert report.loss == pytest.approx(expected, abs=1e-5)
    assert report.tokens == sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    assert report.tokens <= report.computed_tokens


def test_a_label_weighs_the_same_whichever_attribute_it_is_of(bert: str, single_rank: Rank):
    """One safety label among 32 pairs adds a thirty-second of a loss, not as much as all preferences together."""
    layout = MemberLayout(attributes=("preference", "safety"))
    random = np.random.default_rng(5)

    def pair(index: int, safety: float | None) -> EncodedPair:
        chosen, rejected = (tuple(side) for side in random.integers(3, 300, (2, 5 + index % 4)).tolist())
        return EncodedPair(chosen, rejected, (1.0, safety), None, 1.0, (1.0,))

    pairs = [pair(index, None) for index in range(31)] + [pair(31, 1.0)]
    training = RewardTrainingSettings(centering=0.0)
    report = reward_learner(bert, single_rank, layout, training).train_pairs(pairs)
    # Both heads start near 0, where a pair's loss is log 2.
    assert report.loss == pytest.approx(33 / 32 * np.log(2), rel=0.02)


def test_step_does_not_depend_on_the_micro_batches(bert: str, single_rank: Rank):
    results = []
    for tokens in (24, 4096):
        learner = reward_learner(bert, single_rank, LAYOUT, micro_batch_tokens=tokens)
        report = learner.train_pairs(pairs_of(LAYOUT))
        results.append((report, trained(learner)))
    (small, small_weights), (large, large_weights) = results
    assert small.loss == pytest.approx(large.loss, abs=SCORE_ROUNDING)
    assert largest_difference(small_weights, large_weights) <= 2e-6


def test_heads_differ_from_the_start_and_learn_apart(bert: str, single_rank: Rank):
    learner = reward_learner(bert, single_rank, LAYOUT)
    texts = [pair.chosen for pair in pairs_of(LAYOUT)]
    before = learner.score_tokens(texts)
    assert before.shape == (5, 6)
    assert np.abs(before[:, 0] - before[:, 1]).max() > 1e-4
    learner.train_pairs(pairs_of(LAYOUT))
    moved = learner.score_tokens(texts) - before
    assert np.abs(moved[:, 0] - moved[:, 1]).max() > 1e-3


def test_scores_do_not_depend_on_the_company(bert: str, single_rank: Rank):
    learner = reward_learner(bert, single_rank, LAYOUT, micro_batch_tokens=40)
    texts = [pair.chosen for pair in pairs_of(LAYOUT)] + [pair.rejected for pair in pairs_of(LAYOUT)]
    together = learner.score_tokens(texts)
    apart = np.concatenate([learner.score_tokens([text]) for text in texts])
    np.testing.assert_allclose(together, apart, rtol=0, atol=SCORE_ROUNDING)


@pytest.mark.parametrize("modules", ["all-linear", ["query", "value"]])
def test_adapters_are_merged_when_the_model_is_written(bert: str, single_rank: Rank, tmp_path: Path, modules: Any):
    from transformers import AutoModelForSequenceClassification

    training = RewardTrainingSettings(lora=LoraSettings(rank=4, alpha=8, target_modules=modules))
    learner = reward_learner(bert, single_rank, LAYOUT, training)
    before = trained(learner)
    for _ in range(3):
        learner.train_pairs(pairs_of(LAYOUT))
    changed = {name for name, tensor in trained(learner).items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(".lora_" in name or name.startswith("classifier.") for name in changed)
    texts = [pair.chosen for pair in pairs_of(LAYOUT)]
    expected = learner.score_tokens(texts)
    written = learner.export(str(tmp_path / "merged"))
    plain, loading = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not loading["missing_keys"] | loading["unexpected_keys"]
    assert written == head_hash(weights_in(tmp_path / "merged"))
    with torch.no_grad():
        found = np.concatenate([plain.eval()(input_ids=torch.tensor([ids])).logits.numpy() for ids in texts])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_checkpoint_brings_the_learner_back(bert: str, single_rank: Rank, tmp_path: Path):
    learner = reward_learner(bert, single_rank, LAYOUT)
    learner.train_pairs(pairs_of(LAYOUT))
    learner.save_checkpoint(str(tmp_path))
    learner.train_pairs(pairs_of(LAYOUT))
    resumed = reward_learner(bert, single_rank, LAYOUT)
    resumed.load_checkpoint(str(tmp_path))
    resumed.train_pairs(pairs_of(LAYOUT))
    assert largest_difference(trained(resumed), trained(learner)) == 0


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_packed_rows_give_the_logits_and_gradients_of_single_texts(kind: str, bert: str, tiny: Path):
    """In float64, at a row that is filled up, in training mode without dropout."""
    from rlhf_ray.models.loading import resolve_attention
    from rlhf_ray.reward.core.loading import load_reward_network
    from rlhf_ray.reward.core.network import RewardNetwork, takes_packed_rows

    model = bert if kind == "bert" else str(tiny / "reward_model")
    texts = [list(pair.chosen) for pair in PAIRS] + [list(pair.rejected) for pair in PAIRS]
    found = {}
    for packed in (True, False):
        network = load_reward_network(
            model, dtype="float64", pad_token_id=0, attention="eager", num_labels=1, new_head=True, dropout=0.0
        )
        assert takes_packed_rows(network)
        if packed:
            network.set_attn_implementation(resolve_attention("auto"))
        reward_network = RewardNetwork(network, 0, packed)
        logits, num_tokens = reward_network(texts)
        logits[:, 0].cumsum(0).sum().backward()
        gradients = {name: each.grad for name, each in network.named_parameters() if each.grad is not None}
        found[packed] = (logits.detach(), gradients, num_tokens)
    (row, row_gradients, row_tokens), (padded, gradients, padded_tokens) = found[True], found[False]
    torch.testing.assert_close(row, padded, rtol=0, atol=1e-5)
    assert row_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(row_gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert sum(map(len, texts)) <= row_tokens < padded_tokens
