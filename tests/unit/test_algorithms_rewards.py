"""Shaping of scores and rewards of tokens."""

import math

import pytest
import torch

from rlhf_ray.algorithms.rewards import length_penalty, rescale_by_length, shape_scores, token_rewards
from rlhf_ray.algorithms.segments import Moments
from rlhf_ray.config.algorithm import AlgorithmSettings, LengthSettings

SCORES = torch.tensor([5.0, -5.0, 1.0, math.nan], dtype=torch.float64)
OK = torch.tensor([True, True, True, False])
ENDED = torch.tensor([True, False, False, True])
MOMENTS = Moments.of(SCORES, OK)


def test_the_penalty_comes_after_the_clip() -> None:
    shaped = shape_scores(SCORES, OK, ENDED, AlgorithmSettings(score_clip=2.0, missing_eos_penalty=1.0), MOMENTS)
    assert shaped.tolist() == [2.0, -3.0, 0.0, 0.0]


def test_the_clip_comes_after_whitening() -> None:
    algorithm = AlgorithmSettings(score_clip=1.0, missing_eos_penalty=0.5, reward_whiten=True)
    shaped = shape_scores(SCORES, OK, ENDED, algorithm, MOMENTS)
    whitened = [(score - MOMENTS.mean) / math.sqrt(MOMENTS.variance + 1e-8) for score in (5.0, -5.0, 1.0)]
    expected = [1.0, -1.5, whitened[2] - 0.5, 0.0]
    assert whitened[0] > 1
    torch.testing.assert_close(shaped, torch.tensor(expected, dtype=torch.float64))


def test_nothing_is_shaped_unless_asked() -> None:
    shaped = shape_scores(SCORES, OK, ENDED, AlgorithmSettings(), MOMENTS)
    assert shaped.tolist() == [5.0, -5.0, 1.0, 0.0]


def test_the_score_is_at_the_last_token_and_the_kl_at_every_one() -> None:
    kl = torch.tensor([1.0, 2.0, 3.0, -4.0, 5.0])
    rewards = token_rewards(torch.tensor([10.0, 20.0]), kl, torch.tensor([2, 3]), 0.5)
    assert rewards.tolist() == [-0.5, 9.0, -1.5, 2.0, 17.5]
    assert kl.tolist() == [1.0, 2.0, 3.0, -4.0, 5.0]


def test_the_score_is_at_the_last_sampled_token() -> None:
    sampled = torch.tensor([True, False, True, True, False])
    rewards = token_rewards(torch.tensor([10.0, 20.0]), torch.zeros(5), torch.tensor([2, 3]), 0.5, sampled)
    assert rewards.tolist() == [10.0, 0.0, 0.0, 20.0, 0.0]


def test_a_penalty_for_each_token_or_for_each_token_off_the_target() -> None:
    lengths = torch.tensor([1, 10, 16])
    assert length_penalty(lengths, LengthSettings(penalty=0.5), 16).tolist() == [0.5, 5.0, 8.0]
    assert length_penalty(lengths, LengthSettings(penalty=0.5, target=10), 16).tolist() == [4.5, 0.0, 3.0]
    assert length_penalty(lengths, LengthSettings(), 16).tolist() == [0.0, 0.0, 0.0]


def test_the_soft_overlong_punishment_is_that_of_the_paper() -> None:
    """DAPO's eq. 13 as it is written, with L_max = 20 and L_cache = 8: 0 up to 12 tokens, −1 at 20."""

    def written_out(length: int) -> float:
        if length <= 20 - 8:
            return 0.0
        return ((20 - 8) - length) / 8

    lengths = torch.arange(1, 21)
    settings = LengthSettings(overlong_buffer=8, overlong_penalty=3.0)
    expected = [-3.0 * written_out(length) for length in lengths.tolist()]
    assert length_penalty(lengths, settings, 20).tolist() == pytest.approx(expected, abs=1e-12)
    assert expected[-1] == 3.0


def test_rescaling_is_relative_to_the_lengths_of_the_valid_group() -> None:
    scores = torch.tensor([2.0, 2.0, -2.0, math.nan, 3.0], dtype=torch.float64)
    ok, group_ids = torch.tensor([True, True, True, False, True]), torch.tensor([4, 4, 4, 4, 8])
    lengths = torch.tensor([10, 30, 20, 500, 7])
    found = rescale_by_length(scores, ok, lengths, group_ids, 0.5)
    # The group's valid lengths have a mean of 20; a response of exactly the mean length loses a factor of 1 + α.
    assert found[:3].tolist() == pytest.approx([2 / 1.25, 2 / 1.75, -2.0])
    assert float(found[4]) == pytest.approx(3 / 1.5)
    assert torch.equal(rescale_by_length(scores, ok, lengths, group_ids, 0.0)[ok], scores[ok])
