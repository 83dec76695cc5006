"""Costs by arithmetic, against values computed by hand, and the page that shows them."""

import pytest

from bench.costs import (
    CASES,
    PAGE,
    QWEN_1_5B,
    QWEN_7B,
    QWEN_32B,
    QWEN_72B,
    Hardware,
    Model,
    decode,
    forward,
    memory_of,
    optimizer,
    page_with,
    prefill,
    step_of,
    tables,
    training,
    weight_sync,
)
from rlhf_ray.config.settings import LearnerSettings

# 2 layers, 8 wide, 2 heads of 4 with one head of keys, an MLP of 16, 10 words.
SMALL = Model("small", layers=2, hidden=8, heads=2, kv_heads=1, intermediate=16, vocabulary=10)
# 1 FLOP/s, 1 byte/s: times are FLOPs and bytes.
UNIT = Hardware(
    flops=1, memory_bandwidth=1, node_bandwidth=1, network_bandwidth=1, compute_share=1, memory_share=1, link_share=1
)


def test_a_small_model_by_hand():
    attention, mlp, projection = 8 * 8 * 2 + 8 * 4 * 2, 3 * 8 * 16, 8 * 10
    assert SMALL.matrices == 2 * (attention + mlp) + projection == 1232
    assert SMALL.parameters == 1232 + 80
    assert SMALL.weight_bytes == 2 * 1312
    assert SMALL.kv_bytes == 2 * 2 * 1 * 4 * 2
    # 3 tokens in a sequence of 3: 2 FLOPs a weight; scores and sums over half the sequence in each layer.
    assert SMALL.forward_flops(3, 3) == 3 * (2 * 1232 + 2 * (2 * 8 + 2 * 8) * 1.5)


@pytest.mark.parametrize(
    ("model", "billions"), [(QWEN_1_5B, 1.54), (QWEN_7B, 7.61), (QWEN_32B, 32.5), (QWEN_72B, 72.7)]
)
def test_models_have_the_parameters_of_their_cards(model: Model, billions: float):
    assert model.parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_prefill_is_arithmetic_for_many_tokens_and_memory_for_one():
    assert prefill(SMALL, UNIT, 5, 4, 1).seconds == SMALL.forward_flops(20, 4)
    few = prefill(SMALL, Hardware(**{**vars(UNIT), "flops": 1e9}), 1, 1, 2)
    assert (few.seconds, few.bound_by) == (SMALL.weight_bytes / 2, "memory")


def test_decoding_reads_the_weights_once_a_step_and_the_keys_of_all_that_came_before():
    fast = Hardware(**{**vars(UNIT), "flops": 1e12})
    found = decode(SMALL, fast, samples=3, prompt_tokens=5, response_tokens=4, longest=6, gpus=2)
    # Σ_{t<4} (5 + t) = 26 by counting; the integral that stands for it is 4·5 + 4²/2 = 28.
    assert found.seconds == (6 * 2624 + 3 * 28 * 32) / 2
    assert found.bound_by.startswith("memory")


def test_gathering_is_bound_by_the_node_or_by_its_adapters_together():
    hardware = Hardware(**{**vars(UNIT), "node_bandwidth": 10.0})
    assert hardware.gather_s(80, 4) == 80 * 3 / 4 / 10
    # Four nodes: each receives three quarters over eight adapters.
    assert hardware.gather_s(80, 32) == pytest.approx(max(80 * 31 / 32 / 10, 80 * 3 / 4 / 8))


def test_learning_is_four_passes_with_checkpointing_and_gathers_for_each():
    learner = LearnerSettings(replicas=4, gpus=1, zero_stage=3, gradient_checkpointing=True, micro_batch_tokens=10)
    tokens = 80.0
    found = training("t", SMALL, UNIT, tokens, 8, 2, learner)
    assert found.seconds == 4 * 2 * SMALL.forward_flops(tokens, 8) / 4
    slow_links = Hardware(**{**vars(UNIT), "flops": 1e12})
    found = training("t", SMALL, slow_links, tokens, 8, 2, learner)
    # 80 tokens on 4 ranks in passes of 10, twice over; 3 gathers in bfloat16 and a reduction in float32.
    assert found.seconds == 2 * 2 * (3 * 2624 + 4 * 1312) * 3 / 4
    alone = training("t", SMALL, slow_links, tokens, 8, 1, learner.model_copy(update={"replicas": 1}))
    assert alone.bound_by == "arithmetic"


def test_other_parts_by_hand():
    assert forward("f", SMALL, UNIT, 10, 5, 2, None).seconds == SMALL.forward_flops(10, 5) / 2
    gathering = forward("f", SMALL, Hardware(**{**vars(UNIT), "flops": 1e12}), 10, 5, 2, 5)
    assert gathering.seconds == 2624 / 2
    assert optimizer("o", SMALL, UNIT, 3, 2).seconds == 3 * 1312 * 30 / 2
    assert weight_sync(SMALL, UNIT, 1, same_node=False).seconds == 2624


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.file)
def test_a_step_is_the_sum_of_its_halves_or_the_longer_of_them(case):
    step = step_of(case, Hardware())
    both, sync = (step.sampling_half_s, step.learning_half_s), step.sync.seconds
    assert step.synchronous_s == pytest.approx(sum(both) + sync)
    assert step.overlapped_s == pytest.approx(max(both) + sync)
    # Every part is in one of the halves, and beside or before every other.
    assert step.synchronous_s <= sum(part.seconds for part in step.parts)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.file)
def test_what_each_role_keeps_fits_its_gpu(case):
    """Passes need room too: a tenth of the GPU at least."""
    held = memory_of(case)
    reference = case.config.reference
    if reference is not None and reference.gpus < 1:  # shares its GPU with the reward model
        held["reference"] += held.pop("reward")
    for role, size in held.items():
        assert size < 0.9 * Hardware().memory, role


def test_the_page_shows_what_the_code_computes():
    page = PAGE.read_text(encoding="utf-8")
    assert page_with(page, tables()) == page, "run `python -m bench.costs`"
    assert page.count("*Computed, not run.*") == len(CASES)
    hardware = Hardware()
    for figure in (f"{hardware.flops / 1e12:.0f} TFLOP/s", "3.35 TB/s", "450 GB/s", "50 GB/s"):
        assert figure in page
