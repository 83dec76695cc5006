"""Scores of attributes and members against written-out sums."""

import numpy as np
import pytest

from rlhf_ray.reward.core.ensemble import (
    MemberAggregation,
    aggregate_attributes,
    aggregate_members,
    centre_within_groups,
    disagreement,
    fit_member_scale,
    standardise,
)

HOWS: tuple[MemberAggregation, ...] = ("mean", "minimum", "mean_minus_variance")


def test_members_by_hand() -> None:
    scores = np.array([[1.0, 2.0, 6.0], [-1.0, -1.0, -1.0]])
    # Mean 3, deviations −2, −1, 3: population variance 14/3.
    assert aggregate_members(scores, "mean").tolist() == [3.0, -1.0]
    assert aggregate_members(scores, "minimum").tolist() == [1.0, -1.0]
    assert aggregate_members(scores, "mean_minus_variance", 0.5) == pytest.approx([3 - 7 / 3, -1])
    assert disagreement(scores) == pytest.approx([(14 / 3) ** 0.5, 0])


def test_variance_is_the_populations_over_any_leading_shape() -> None:
    scores = np.random.default_rng(0).normal(size=(4, 3, 5))
    expected = scores.mean(-1) - 0.7 * scores.var(-1)
    assert aggregate_members(scores, "mean_minus_variance", 0.7) == pytest.approx(expected, abs=1e-14)
    assert disagreement(scores) == pytest.approx(scores.std(-1), abs=1e-14)


@pytest.mark.parametrize("how", HOWS)
def test_one_member_is_its_own_ensemble_to_the_bit(how: MemberAggregation) -> None:
    scores = np.random.default_rng(1).normal(size=(50, 1))
    assert np.array_equal(aggregate_members(scores, how, 3.0), scores[:, 0])
    assert np.array_equal(disagreement(scores), np.zeros(50))


def test_attributes_are_weighted_for_each_member() -> None:
    scores = np.arange(12.0).reshape(2, 3, 2)
    result = aggregate_attributes(scores, [1.0, 0.5, -2.0])
    assert result.shape == (2, 2)
    assert result[1, 0] == 6 + 0.5 * 8 - 2 * 10
    assert result == pytest.approx(np.einsum("nak,a->nk", scores, [1.0, 0.5, -2.0]))


def test_weights_must_be_as_many_as_attributes() -> None:
    with pytest.raises(ValueError, match="2 weights for 3 attributes"):
        aggregate_attributes(np.zeros((2, 3, 1)), [1.0, 1.0])


@pytest.mark.parametrize("members", [1, 3, 9, 33])
def test_a_score_does_not_depend_on_its_batch_by_a_bit(members: int) -> None:
    scores = np.random.default_rng(2).normal(size=(257, 11, members))
    weights = np.random.default_rng(3).normal(size=11).tolist()

    def whole(part: np.ndarray) -> np.ndarray:
        return aggregate_members(aggregate_attributes(part, weights), "mean_minus_variance", 0.3)

    together = whole(scores)
    for size in (1, 2, 64):
        apart = np.concatenate([whole(scores[start : start + size]) for start in range(0, 257, size)])
        assert np.array_equal(apart, together)


def test_standardised_members_have_one_unit_within_pairs() -> None:
    generator = np.random.default_rng(4)
    chosen, rejected = generator.normal(size=(2, 500, 3)) * [0.1, 1, 20] + [7, -3, 100]
    scale = fit_member_scale(chosen, rejected)
    standard = [standardise(side, scale) for side in (chosen, rejected)]
    assert np.concatenate(standard).mean(0) == pytest.approx([0, 0, 0], abs=1e-12)
    within = (np.stack(standard) - np.mean(standard, axis=0)).var(0, ddof=0).sum(0) * 2 / 500
    assert within == pytest.approx([1, 1, 1])


def test_offsets_of_prompts_are_no_part_of_a_members_scale() -> None:
    generator = np.random.default_rng(8)
    prompts = generator.normal(size=(400, 1))
    chosen, rejected = generator.normal(size=(2, 400, 1)) + np.array([[[0.5]], [[-0.5]]])
    # The second member says the same of every pair, and lies elsewhere from prompt to prompt.
    members = [np.concatenate([side, side + 10 * prompts], axis=1) for side in (chosen, rejected)]
    scale = fit_member_scale(*members)
    assert scale.scale[0] == pytest.approx(scale.scale[1], rel=1e-12)


def test_offset_and_scale_of_a_member_change_nothing_after_standardising() -> None:
    generator = np.random.default_rng(5)
    chosen, rejected, other = (generator.normal(size=(size, 4)) for size in (150, 150, 50))
    scale, offset = np.array([0.5, 1, 3, 10]), np.array([-100, 0, 5, 50])
    moved = standardise(other * scale + offset, fit_member_scale(chosen * scale + offset, rejected * scale + offset))
    plain = standardise(other, fit_member_scale(chosen, rejected))
    for how in HOWS:
        assert aggregate_members(moved, how, 0.5) == pytest.approx(aggregate_members(plain, how, 0.5))
    # What it is there against: the lowest member alone would decide.
    assert np.array_equal(aggregate_members(other * scale + offset, "minimum"), (other * scale + offset)[:, 0])


def test_members_are_centred_within_prompts_of_several_responses() -> None:
    generator = np.random.default_rng(9)
    prompts = generator.permutation(np.repeat(np.arange(30), 6))
    shared, own = generator.normal(size=(180, 1)), 0.1 * generator.normal(size=(180, 4))
    offsets = 5 * generator.normal(size=(30, 4))
    scores = shared + own + offsets[prompts]
    centred = centre_within_groups(scores, prompts)
    for prompt in range(30):  # by hand
        rows = prompts == prompt
        expected = scores[rows] - scores[rows].mean(0) + scores[rows].mean()
        assert centred[rows] == pytest.approx(expected, abs=1e-12)
    assert disagreement(scores).mean() > 3
    assert disagreement(centred).mean() < 0.1
    # The worst case orders the responses to a prompt as they deserve; the lowest offset did before.
    worst = aggregate_members(centred, "minimum") - offsets.mean(1)[prompts]
    assert np.abs(worst - shared[:, 0]).max() < 0.5


def test_a_prompts_only_response_and_scores_that_are_none_are_left_as_they_are() -> None:
    scores = np.array([[1.0, 4.0], [2.0, 2.0], [0.0, 6.0], [np.nan, 1.0]])
    centred = centre_within_groups(scores, np.array([7, 3, 7, 7]))
    assert centred[1].tolist() == [2.0, 2.0]
    # Prompt 7 has member means 0.5 and 5 over its two scored responses, and 2.75 over both.
    assert centred[[0, 2]].tolist() == [[3.25, 1.75], [2.25, 3.75]]
    assert np.isnan(centred[3, 0])


@pytest.mark.parametrize("broken", [0.25, np.nan, np.inf])
def test_a_member_without_an_opinion_is_refused(broken: float) -> None:
    scores = np.random.default_rng(6).normal(size=(2, 20, 3))
    scores[..., 1] = broken
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="member 1"):
        fit_member_scale(*scores)
