"""A packed row gives what each sequence gives alone, in values and gradients, and nothing crosses between sequences."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rlhf_ray.models import packing
from rlhf_ray.models.loading import resolve_attention
from rlhf_ray.models.packing import RolloutRows, _row_layout, micro_batches, pack, packed_sdpa
from rlhf_ray.models.token_models import PolicyModel, load_policy_model
from rlhf_ray.rollout import offsets
from tests.making import HIDDEN_SIZE, random_rollout, rounding

LENGTHS = (13, 2, 29, 7, 21)


def sequences(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Any]:
    random = np.random.default_rng(seed)
    return [random.integers(3, 300, length).astype(np.int32) for length in lengths]


@pytest.fixture
def packed_model(policy_model: str) -> PolicyModel:
    attention = resolve_attention("auto")
    assert attention == "packed_sdpa"
    return load_policy_model(policy_model, dtype="float32", attention=attention, temperature=0.7, float32_logits=True)


@pytest.mark.parametrize("plain", ["eager", "sdpa"])
def test_packed_equals_one_at_a_time_in_loss_and_gradients(policy_model: str, packed_model: PolicyModel, plain: str):
    from transformers import AutoModelForCausalLM

    rows, learn_from = sequences(), [5, 1, 11, 6, 1]
    batch = pack(rows, learn_from)
    weights = torch.linspace(-1, 1, len(batch.targets))
    loss, packed_logprobs, _ = packed_model(batch, lambda part, logprobs, _: (logprobs * weights[part]).sum())
    loss.backward()

    model = AutoModelForCausalLM.from_pretrained(policy_model, attn_implementation=plain, dtype=torch.float32)
    alone = []
    for tokens, first in zip(rows, learn_from, strict=True):
        ids = torch.from_numpy(tokens.astype(np.int64))
        logits = model(input_ids=ids[None]).logits[0, first - 1 : -1]
        alone.append(torch.log_softmax(logits / 0.7, -1).gather(-1, ids[first:, None])[:, 0])
    expected = torch.cat(alone)
    (expected * weights).sum().backward()

    torch.testing.assert_close(packed_logprobs, expected, rtol=0, atol=rounding(HIDDEN_SIZE))
    assert abs(float(((packed_logprobs - expected) * weights).mean().detach())) <= rounding(HIDDEN_SIZE)
    of_packed = dict(packed_model.language_model.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        scale = float(parameter.grad.abs().max())
        assert float((of_packed[name].grad - parameter.grad).abs().max()) <= rounding(HIDDEN_SIZE, max(scale, 1)), name


def test_changing_a_neighbour_changes_nothing(packed_model: PolicyModel):
    rows, others = sequences(), sequences(seed=1)
    learn_from = [1] * len(rows)
    starts = offsets([len(row) - 1 for row in rows])
    own = slice(int(starts[2]), int(starts[3]))

    def forward(chosen: list[Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        packed_model.zero_grad()
        batch = pack(chosen, learn_from)
        loss, logprobs, _ = packed_model(batch, lambda part, logprobs, _: logprobs[own].sum())
        loss.backward()
        logprobs = logprobs[own]
        gradients = {name: p.grad.clone() for name, p in packed_model.named_parameters() if p.grad is not None}
        return logprobs.detach(), gradients

    logprobs, gradients = forward(rows)
    with_others, gradients_with_others = forward([*others[:2], rows[2], *others[3:]])
    assert torch.equal(logprobs, with_others)
    changed = {id(row): set(row.tolist()) for row in [*rows, *others]}
    foreign = sorted(set().union(*changed.values()) - set(rows[2].tolist()))
    embedding = gradients["language_model.model.embed_tokens.weight"]
    assert not embedding[foreign].any(), "a loss on one sequence reached the tokens of another"
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_with_others[name], gradient, rtol=0, atol=1e-7)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention_equals_sdpa_on_each_sequence(causal: bool, key_heads: int):
    torch.manual_seed(0)
    total, starts = sum(LENGTHS), offsets(LENGTHS)
    query = torch.randn(1, 4, total, 32, requires_grad=True)
    key, value = (torch.randn(1, key_heads, total, 32, requires_grad=True) for _ in range(2))
    inputs = (query, key, value)
    upstream = torch.randn(1, total, 4, 32)

    module = torch.nn.Module()
    module.is_causal = causal
    ours, _ = packed_sdpa(
        module, *inputs, None, scaling=0.2, cu_seq_lens_q=torch.from_numpy(starts), max_length_q=max(LENGTHS)
    )
    our_gradients = torch.autograd.grad((ours * upstream).sum(), inputs)
    parts = [
        F.scaled_dot_product_attention(
            *(each[:, :, start:end] for each in inputs), is_causal=causal, scale=0.2, enable_gqa=key_heads != 4
        ).transpose(1, 2)
        for start, end in pairwise(starts)
    ]
    expected = torch.cat(parts, dim=1)
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), inputs)

    # A score is a sum over a head's 32 channels; entries are normal, so of about 1, and gradients sum several of them.
    torch.testing.assert_close(ours, expected, rtol=0, atol=rounding(32))
    for our_gradient, gradient in zip(our_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(our_gradient, gradient, rtol=0, atol=rounding(32, max(LENGTHS) ** 0.5))


def test_an_explicit_is_causal_outranks_the_module():
    module = torch.nn.Module()
    module.is_causal = True
    qkv = [torch.randn(1, 2, 6, 32) for _ in range(3)]
    bounds = {"cu_seq_lens_q": torch.tensor([0, 6]), "max_length_q": 6}
    both_ways, _ = packed_sdpa(module, *qkv, None, is_causal=False, **bounds)
    causal, _ = packed_sdpa(module, *qkv, None, **bounds)
    torch.testing.assert_close(both_ways[0, -1], causal[0, -1])
    assert not torch.allclose(both_ways[0, 0], causal[0, 0])


def test_attention_without_bounds_is_refused():
    qkv = [torch.randn(1, 2, 6, 32) for _ in range(3)]
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        packed_sdpa(torch.nn.Module(), *qkv, None)


FEATURES: dict[str, dict[str, Any]] = {
    "window": {"sliding_window": 5},
    "window of more than one step of widths": {"sliding_window": 20},
    "soft cap": {"softcap": 1.5},
    "sinks": {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)},
    "all": {"sliding_window": 5, "softcap": 1.5, "s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)},
    "none": {},
}


def exact_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sliding_window: int = 0, softcap: float = 0.0,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """One sequence in float64, `[heads, length, size]`, a query at a time, from the definitions."""
    outputs = []
    for head in range(query.shape[0]):
        group = head * key.shape[0] // query.shape[0]
        for position in range(query.shape[1]):
            first = max(0, position + 1 - sliding_window) if sliding_window else 0
            scores = key[group, first : position + 1] @ query[head, position] * 0.2
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            sink = 0.0 if s_aux is None else s_aux[head].exp()
            weights = scores.exp() / (scores.exp().sum() + sink)
            outputs.append(weights @ value[group, first : position + 1])
    return torch.stack(outputs).view(query.shape[0], query.shape[1], -1)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("value_size", [32, 16])
def test_what_architectures_add_to_attention(feature: str, value_size: int):
    """Soft caps (Gemma 2), sliding windows (Mistral), attention sinks (GPT-OSS), and values of their own size."""
    torch.manual_seed(0)
    total, starts = sum(LENGTHS), offsets(LENGTHS)
    query, key = torch.randn(1, 4, total, 32), torch.randn(1, 2, total, 32)
    value = torch.randn(1, 2, total, value_size)
    for each in (query, key, value):
        each.requires_grad_()
    upstream = torch.randn(1, total, 4, value_size)
    bounds = {"cu_seq_lens_q": torch.from_numpy(starts), "max_length_q": max(LENGTHS)}
    ours, _ = packed_sdpa(torch.nn.Module(), query, key, value, None, scaling=0.2, **bounds, **FEATURES[feature])
    our_gradients = torch.autograd.grad((ours * upstream).sum(), (query, key, value))
    exact = [each.detach().double().requires_grad_() for each in (query, key, value)]
    parts = [
        exact_attention(*(each[0, :, start:end] for each in exact), **FEATURES[feature]).transpose(0, 1)
        for start, end in pairwise(starts)
    ]
    expected = torch.cat(parts)[None]
    gradients = torch.autograd.grad((expected * upstream).sum(), exact)
    # Scores are sums of 32 terms; values and gradients are averages over at most 29 keys.
    bound = rounding(32 + max(LENGTHS))
    assert float((ours - expected).detach().abs().max()) <= bound
    for our_gradient, gradient in zip(our_gradients, gradients, strict=True):
        assert float((our_gradient - gradient).abs().max()) <= bound * max(1.0, float(gradient.abs().max()))


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("length", [4, 21])
def test_what_shares_the_row_changes_nothing(feature: str, length: int):
    """Bit-for-bit, with what architectures add."""
    torch.manual_seed(0)
    options = {name: each.float() if torch.is_tensor(each) else each for name, each in FEATURES[feature].items()}

    def attend(qkv: list[torch.Tensor], lengths: list[int]) -> torch.Tensor:
        bounds = {"cu_seq_lens_q": torch.from_numpy(offsets(lengths)), "max_length_q": max(lengths)}
        return packed_sdpa(torch.nn.Module(), *qkv, None, **bounds, **options)[0]

    own = [torch.randn(1, heads, length, 32) for heads in (4, 2, 2)]
    others = [torch.randn(1, heads, 40, 32) for heads in (4, 2, 2)]
    alone = attend(own, [length])
    together = attend([torch.cat(pair, dim=2) for pair in zip(own, others, strict=True)], [length, 40])
    assert torch.equal(together[:, :length], alone)


def test_a_mask_of_the_models_own_is_refused():
    qkv = [torch.randn(1, 2, 6, 32) for _ in range(3)]
    with pytest.raises(ValueError, match="cannot follow"):
        packed_sdpa(torch.nn.Module(), *qkv, torch.zeros(6, 6), cu_seq_lens_q=torch.tensor([0, 6]), max_length_q=6)


@pytest.mark.parametrize("feature", ["window", "soft cap", "sinks"])
def test_attention_both_ways_that_it_does_not_compute_is_refused(feature: str):
    qkv = [torch.randn(1, 4, 6, 32) for _ in range(3)]
    bounds = {"cu_seq_lens_q": torch.tensor([0, 6]), "max_length_q": 6}
    with pytest.raises(ValueError, match="only for causal attention"):
        packed_sdpa(torch.nn.Module(), *qkv, None, is_causal=False, **bounds, **FEATURES[feature])


def test_a_window_wider_than_the_sequences_changes_nothing():
    qkv = [torch.randn(1, 2, 6, 32) for _ in range(3)]
    bounds = {"cu_seq_lens_q": torch.tensor([0, 6]), "max_length_q": 6}
    windowed, _ = packed_sdpa(torch.nn.Module(), *qkv, None, sliding_window=6, **bounds)
    plain, _ = packed_sdpa(torch.nn.Module(), *qkv, None, **bounds)
    torch.testing.assert_close(windowed, plain, rtol=0, atol=rounding(32))


def naive_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, _: torch.Tensor,
    longest: int, __: int, *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> torch.Tensor:  # fmt: skip
    """`torch.nn.attention.varlen.varlen_attn` as its documentation has it: a query sees so many keys to its left and
    right, -1 for all of them."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert longest == int(starts.diff().max())
    parts = []
    for start, end in pairwise(starts.tolist()):
        at = torch.arange(end - start)
        distance = at[:, None] - at[None, :]
        left, right = (len(at) if side < 0 else side for side in window_size)
        hidden = (distance > left) | (-distance > right)
        q, k, v = (each[start:end].transpose(0, 1) for each in (query, key, value))
        k, v = (each.repeat_interleave(q.shape[0] // k.shape[0], 0) for each in (k, v))
        parts.append(((q @ k.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 5}, {"is_causal": False}])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_torch_is_asked_for_the_same_attention(
    options: dict[str, Any], key_heads: int, monkeypatch: pytest.MonkeyPatch
):
    """What a GPU's kernel is told, which is not on this machine; `bench.one_gpu` has its numbers."""
    torch.manual_seed(0)
    heads = (4, key_heads, key_heads)
    qkv = [torch.randn(1, count, sum(LENGTHS), 32, dtype=torch.float64) for count in heads]
    bounds = {"cu_seq_lens_q": torch.from_numpy(offsets(LENGTHS)), "max_length_q": max(LENGTHS)}
    expected, _ = packed_sdpa(torch.nn.Module(), *qkv, None, scaling=0.2, **bounds, **options)
    monkeypatch.setattr(packing, "_has_varlen_kernel", lambda *_: True)
    monkeypatch.setattr(packing, "varlen_attn", naive_varlen)
    ours, _ = packed_sdpa(torch.nn.Module(), *qkv, None, scaling=0.2, **bounds, **options)
    # In float32, which encoders are computed in here.
    torch.testing.assert_close(ours, expected, rtol=0, atol=rounding(32 + max(LENGTHS)))


def test_a_row_is_laid_out_once_for_all_layers(packed_model: PolicyModel):
    """In inference mode first, and then with gradients."""
    batch = pack(sequences(), [1] * len(LENGTHS))
    _row_layout.cache_clear()
    with torch.inference_mode():
        packed_model(batch)
    packed_model(batch, lambda part, logprobs, entropies: logprobs.sum())[0].backward()
    assert (_row_layout.cache_info().misses, _row_layout.cache_info().hits) == (1, 3)


def test_a_model_is_given_rows_of_few_lengths():
    """Every shape of a product is compiled and kept, so a learner would grow with every new length."""
    for octave in (64, 1024, 4096):
        given = set()
        for length in range(octave, 2 * octave):
            inputs = pack([np.full(length, 5, dtype=np.int32)], [1]).model_inputs()
            tokens = inputs["input_ids"].shape[1]
            assert length <= tokens <= max(length * 33 / 32, length + 15)
            assert inputs["position_ids"].shape == (1, tokens)
            assert int(inputs["cu_seq_lens_q"][-1]) == tokens
            given.add(tokens)
        assert len(given) <= 33


def test_pack_points_at_the_tokens_before_the_predicted_ones():
    batch = pack([np.array([5, 6, 7, 8], dtype=np.int32), np.array([9, 10], dtype=np.int32)], [2, 1], [10, 0])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch.targets.tolist() == [7, 8, 10]
    assert batch.predict_at.tolist() == [1, 2, 4]
    assert batch.columns.tolist() == [10, 11, 0]


def test_micro_batches_hold_every_sequence_once_and_keep_to_the_limit():
    lengths = [3, 40, 8, 8, 1, 17, 25]
    groups = micro_batches(lengths, 25)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or sum(lengths[index] for index in group) <= 25 for group in groups)
    assert micro_batches(lengths, 25) == groups
    assert micro_batches([], 25) == []


def test_micro_batches_are_balanced_and_as_many_as_asked_for():
    random = np.random.default_rng(0)
    for _ in range(50):
        lengths = random.integers(1, 40, random.integers(1, 30)).tolist()
        fewest = micro_batches(lengths, 64)
        for at_least in (1, len(fewest) + 2, 100):
            groups = micro_batches(lengths, 64, at_least)
            assert len(groups) == max(len(fewest), min(at_least, len(lengths)))
            assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
            tokens = [sum(lengths[index] for index in group) for group in groups]
            assert max(tokens) <= 64
            # Cut into consecutive parts, no pack need exceed the mean by more than the longest sequence.
            assert max(tokens) <= sum(lengths) / len(groups) + max(lengths)


def test_rollout_rows_number_samples_and_columns_through():
    rollouts = [random_rollout(0), random_rollout(1)]
    rows = RolloutRows(rollouts)
    assert rows.num_columns == sum(len(rollout.logprobs) for rollout in rollouts)
    assert list(rows.samples_of(1)) == [4, 5, 6, 7]
    targets = np.zeros(rows.num_columns, dtype=np.int64)
    for batch in rows.pack(range(len(rows)), 40):
        targets[batch.columns.numpy()] = batch.targets.numpy()
    responses = [
        rollout.sample_tokens(sample)[rollout.prompt_lengths[sample] :]
        for rollout in rollouts
        for sample in range(rollout.num_samples)
    ]
    assert targets.tolist() == np.concatenate(responses).tolist()
