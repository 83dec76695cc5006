"""Which prompts of a step are trained on, by hand and against brute force."""

import numpy as np
import pytest

from rlhf_ray.algorithms.groups import choose_groups

NAN = float("nan")


def test_the_first_groups_whose_scores_differ_take_the_place_of_those_whose_scores_do_not():
    scores = np.array([[1, 1], [0, 1], [0, 0], [1, 0], [0.5, 0.5], [2, 3], [3, 2]])
    choice = choose_groups(scores, 3)
    assert choice.places == (1, 3, 5)
    assert (choice.num_groups, choice.num_compared, choice.num_uniform) == (7, 7, 3)
    assert (choice.num_surplus, choice.num_unfilled) == (1, 0)


def test_a_step_that_cannot_be_filled_keeps_its_size_and_the_order_of_the_draw():
    scores = np.array([[1, 1], [0, 0], [1, 0], [0, 0]])
    choice = choose_groups(scores, 3)
    assert choice.places == (0, 1, 2)
    assert (choice.num_uniform, choice.num_surplus, choice.num_unfilled) == (3, 0, 2)


def test_a_group_without_two_scores_says_nothing_and_is_not_uniform():
    scores = np.array([[1, NAN, NAN], [NAN, NAN, NAN], [1, NAN, 0], [1, NAN, 1]])
    choice = choose_groups(scores, 2)
    assert choice.places == (2, 3)
    assert (choice.num_compared, choice.num_uniform, choice.num_unfilled) == (2, 1, 1)


def test_groups_without_scores_come_after_those_whose_scores_are_alike():
    """A step of nothing but them would end the run, although others were scored."""
    choice = choose_groups(np.array([[NAN, NAN], [1, NAN], [1, 1]]), 1)
    assert choice.places == (2,)


def test_without_spare_groups_all_are_trained_on():
    scores = np.array([[1.0], [2.0], [2.0]])
    choice = choose_groups(scores, 3)
    assert choice.places == (0, 1, 2)
    assert (choice.num_compared, choice.num_uniform) == (0, 0)


@pytest.mark.parametrize("seed", range(20))
def test_choice_equals_brute_force(seed: int):
    random = np.random.default_rng(seed)
    scores = random.integers(0, 2, (12, 3)).astype(float)
    scores[random.random(scores.shape) < 0.2] = NAN
    wanted = int(random.integers(1, 13))
    found = [[score for score in group if not np.isnan(score)] for group in scores.tolist()]
    differing = [place for place, group in enumerate(found) if len(set(group)) > 1]
    uniform = [place for place, group in enumerate(found) if len(group) > 1 and len(set(group)) == 1]
    others = [*uniform, *(place for place in range(12) if place not in [*differing, *uniform])]
    choice = choose_groups(scores, wanted)
    assert sorted(choice.places) == list(choice.places)
    assert set(choice.places) == set([*differing, *others][:wanted])
    assert choice.num_uniform == sum(len(group) > 1 and len(set(group)) == 1 for group in found)
    assert choice.num_surplus == max(len(differing) - wanted, 0)
    assert choice.num_unfilled == max(wanted - len(differing), 0)


def test_what_is_left_out_is_what_is_not_trained_on():
    choice = choose_groups(np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 1.0]]), 2)
    assert choice.places == (1, 3)
    assert choice.left_out(np.arange(40, 48)).tolist() == [40, 41, 44, 45]
