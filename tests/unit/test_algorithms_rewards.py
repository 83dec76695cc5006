"""Shaping of scores and rewards of tokens."""

import math

import torch

from rlhf_ray.algorithms.rewards import shape_scores, token_rewards
from rlhf_ray.algorithms.segments import Moments
from rlhf_ray.config.algorithm import AlgorithmSettings

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
