"""The ready-made reward functions."""

import pytest

from rlhf_ray.reward.functions import contains_label, exact_match, last_number, reasoning_gym


def test_exact_match_looks_past_white_space_only():
    assert exact_match([" yes\n", "Yes", "3", "x"], ["yes", "yes", 3, None]) == [1.0, 0.0, 1.0, None]


def test_a_label_is_contained_as_words_of_its_own():
    responses = ["It is Paris.", "Parisian", "in new york city", "3.5", "x"]
    assert contains_label(responses, ["paris", "Paris", "New York", "(3", None]) == [1.0, 0.0, 1.0, 0.0, None]


def test_the_last_number_counts():
    responses = ["1 + 2 = 3", "3 or 4", "none", "1,234.50 in all", "-7", "7"]
    labels = ["3", "3", "3", "first 10, then #### 1234.5", -7, "no number"]
    assert last_number(responses, labels) == [1.0, 0.0, 0.0, 1.0, 1.0, None]


def test_reasoning_gym_scores_with_its_own_task():
    pytest.importorskip("reasoning_gym")
    entry = {"question": "2 + 2 =", "answer": "4", "metadata": {"source_dataset": "chain_sum"}}
    right, tagged, wordy, wrong = reasoning_gym([" 4", "so <answer>4</answer>", "it is 4", "5"], [entry] * 4)
    assert (right, tagged, wrong) == (1.0, 1.0, 0.0)
    assert 0 < wordy < 1
