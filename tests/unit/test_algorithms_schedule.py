"""Values of the learning rate."""

import pytest

from rlhf_ray.algorithms.schedule import learning_rate
from rlhf_ray.config.settings import LearnerSettings


def rates(schedule: str, warmup_steps: int, total_steps: int, min_lr_ratio: float, steps: int) -> list[float]:
    settings = LearnerSettings(
        learning_rate=8.0,
        warmup_steps=warmup_steps,
        lr_schedule=schedule,  # type: ignore[arg-type]
        min_lr_ratio=min_lr_ratio,
    )
    return [learning_rate(step, settings, total_steps) for step in range(steps)]


@pytest.mark.parametrize(
    ("schedule", "min_lr_ratio", "expected"),
    [
        ("constant", 0.0, [2, 4, 6, 8, 8, 8, 8, 8, 8, 8]),
        ("linear", 0.0, [2, 4, 6, 8, 8, 6, 4, 2, 0, 0]),
        ("linear", 0.5, [2, 4, 6, 8, 8, 7, 6, 5, 4, 4]),
        ("cosine", 0.0, [2, 4, 6, 8, 8, 4 + 2 * 2**0.5, 4, 4 - 2 * 2**0.5, 0, 0]),
        ("cosine", 0.5, [2, 4, 6, 8, 8, 6 + 2**0.5, 6, 6 - 2**0.5, 4, 4]),
    ],
)
def test_values_with_warm_up(schedule: str, min_lr_ratio: float, expected: list[float]) -> None:
    assert rates(schedule, 4, 8, min_lr_ratio, 10) == pytest.approx(expected)


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert rates("linear", 0, 4, 0.0, 4) == pytest.approx([8, 6, 4, 2])


def test_a_run_shorter_than_its_warm_up_never_leaves_it() -> None:
    assert rates("cosine", 8, 4, 0.0, 4) == pytest.approx([1, 2, 3, 4])
