"""A sync that did not do what it should is told from rounding, in float32 and in bfloat16."""

import numpy as np
import pytest

from rlhf_ray.algorithms.parity import Parity, Probed, compare
from rlhf_ray.config.settings import WeightSettings

TOKENS = 256
ROUNDING = {True: 1e-6, False: 8e-3}


class Probe:
    """Learner and engine whose log-probs differ by rounding, and move by a step of a given size."""

    def __init__(self, exact: bool, seed: int = 0) -> None:
        self._random, self._exact = np.random.default_rng(seed), exact
        self._before: Probed | None = None
        self._learner = -5 + self._random.normal(size=TOKENS)
        self._engine = self._learner.copy()
        self._version = 0

    def sync(self, step: float, arrives: float = 1.0, engine_stands_still: bool = False) -> Parity:
        """Both move; of the engine's movement only a part may arrive."""
        moved = step * self._random.normal(size=TOKENS)
        self._learner = self._learner + moved
        self._engine = self._engine + arrives * moved
        rounding = ROUNDING[self._exact] * self._random.normal(size=(2, TOKENS))
        if not engine_stands_still:
            self._seen = (self._engine + rounding[0]).astype(np.float32)
        self._version += 1
        learner = (self._learner + rounding[1]).astype(np.float32)
        found = compare(WeightSettings(), self._version, self._seen, learner, exact=self._exact, before=self._before)
        self._before = found
        return found.header()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("step", [0.0, 1e-6, 1e-3, 0.3])
def test_no_false_alarm(exact: bool, step: float):
    for seed in range(20):
        probe = Probe(exact, seed)
        reports = [probe.sync(step) for _ in range(50)]
        assert [report.fault for report in reports] == [""] * 50
    assert reports[0].change == reports[0].residual == 0
    assert reports[1].change == pytest.approx(0.67 * step, abs=3 * ROUNDING[exact], rel=0.5)


@pytest.mark.parametrize(("exact", "step"), [(True, 2e-5), (False, 0.075)])
def test_a_part_that_did_not_arrive_is_noticed(exact: bool, step: float):
    for seed in range(20):
        probe = Probe(exact, seed)
        assert not probe.sync(step).fault
        assert "moved otherwise than the learner's" in probe.sync(step, arrives=0.2).fault


@pytest.mark.parametrize("exact", [True, False])
def test_an_engine_that_did_not_move_at_all_is_noticed_however_small_the_step(exact: bool):
    probe = Probe(exact)
    probe.sync(1e-3)
    assert not probe.sync(1e-3).fault
    assert "weights of the version before" in probe.sync(1e-6, engine_stands_still=True).fault


@pytest.mark.parametrize("broken", [np.nan, np.inf, 0.5])
def test_a_distance_that_is_too_large_is_a_fault_at_the_first_sync(broken: float):
    settings = WeightSettings()
    learner = np.zeros(TOKENS, dtype=np.float32)
    for exact, key in ((True, "max_abs_dlogp_float32"), (False, "max_median_dlogp_bfloat16")):
        report = compare(settings, 0, learner + np.float32(broken), learner, exact=exact)
        assert key in report.parity.fault


def test_one_outlier_in_bfloat16_is_not_a_fault():
    probe = Probe(exact=False)
    probe.sync(0.01)
    probe._engine[0] += 3.0
    assert not probe.sync(0.01).fault
