"""The ledger: compact, truncated on resume as the metrics are, and wrong wherever a sample is used twice or not."""

import json
from pathlib import Path

import numpy as np
import pytest

from rlhf_ray.rollout import SampleUse, id_ranges, ids_in
from rlhf_ray.tracking.ledger import Ledger, LedgerCheck, check_ledger
from rlhf_ray.tracking.logs import truncate_after

SAMPLES = 8


def write(path: Path, step: int, *uses: SampleUse) -> None:
    written = {"versions": (step - 1, step - 1), "digests": ["ab", "cd"], "causes": {}}
    Ledger(path).write(step, uses, spare=np.zeros(0, np.int64), **written)


def whole(step: int) -> SampleUse:
    return SampleUse(((step * SAMPLES - SAMPLES, step * SAMPLES - 1),))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a run of three steps in which two ranks used every sample once."""
    path = tmp_path / "ledger.jsonl"
    write(path, 1, SampleUse(((0, 3),)), SampleUse(((4, 7),)))
    write(
        path,
        2,
        SampleUse(((8, 9), (14, 15)), failed=((12, 13),)),
        SampleUse((), masked=((10, 10),), uniform=((11, 11),)),
    )
    write(path, 3, whole(3))
    return path


def test_ids_become_ranges_and_come_back():
    random = np.random.default_rng(0)
    for size in (0, 1, 5, 40):
        ids = random.integers(0, 60, size)
        ranges = id_ranges(ids)
        assert sorted(ids_in(ranges).tolist()) == sorted(ids.tolist())
        assert all(first <= last for first, last in ranges)
    assert id_ranges(np.array([7, 5, 6, 9])) == ((5, 7), (9, 9))
    assert id_ranges(np.array([5, 6, 6, 7])) == ((5, 6), (6, 7))


def test_a_row_has_what_all_ranks_did(path: Path):
    first, second, _ = map(json.loads, path.read_text().splitlines())
    assert first["trained"] == [[0, 7]]
    assert {name: second[name] for name in ("trained", "failed", "masked", "uniform")} == {
        "trained": [[8, 9], [14, 15]],
        "failed": [[12, 13]],
        "masked": [[10, 10]],
        "uniform": [[11, 11]],
    }
    assert (second["step"], second["versions"]) == (2, [1, 1])
    assert first["digest"] == second["digest"]


def test_a_run_that_used_every_sample_once_has_no_problems(path: Path):
    assert check_ledger(path, SAMPLES, 3) == LedgerCheck(3, 20, 4, 0, 0, 0, ())


def test_truncated_and_done_again_it_is_the_same(path: Path):
    before = path.read_text()
    assert truncate_after(path, 1) == 2
    write(path, 2, SampleUse(((8, 9), (14, 15)), ((12, 13),), ((10, 10),), ((11, 11),)))
    write(path, 3, whole(3))
    assert path.read_text() == before


def test_half_a_line_that_a_crash_left_does_not_spoil_the_next(path: Path):
    with path.open("a") as file:
        file.write('{"step": 4, "trai')
    write(path, 4, whole(4))
    assert check_ledger(path, SAMPLES, 4).problems == ()


@pytest.mark.parametrize(
    ("step", "use", "counts", "problem"),
    [
        (4, SampleUse(((24, 27), (29, 31))), (1, 0, 0), "1 samples missing: 28"),
        (4, SampleUse(((24, 31), (30, 30))), (0, 1, 0), "1 samples used more than once: 30"),
        (3, whole(3), (8, 8, 0), "8 samples missing: 24–31; 8 samples used more than once: 16–23"),
        (
            4,
            SampleUse(((22, 29),)),
            (2, 2, 2),
            "2 samples missing: 30–31; 2 samples used more than once: 22–23; "
            "2 samples used by a step that did not draw them: 22–23",
        ),
        (4, SampleUse(((24, 31), (99, 99))), (0, 0, 1), "1 samples used by a step that did not draw them: 99"),
        (4, SampleUse(((24, 24), (26, 26), (28, 28), (30, 30))), (4, 0, 0), "4 samples missing: 25, 27, 29 …"),
        # Set aside and trained as well.
        (4, SampleUse(((24, 31),), failed=((25, 25),)), (0, 1, 0), "1 samples used more than once: 25"),
    ],
)
def test_what_is_not_exactly_once_is_named(
    path: Path, step: int, use: SampleUse, counts: tuple[int, int, int], problem: str
):
    write(path, step, use)
    check = check_ledger(path, SAMPLES, 4)
    assert (check.missing, check.repeated, check.misplaced) == counts
    assert "; ".join(check.problems) == problem


def test_a_ledger_that_is_not_there_has_everything_missing(tmp_path: Path):
    check = check_ledger(tmp_path / "ledger.jsonl", SAMPLES, 2)
    assert (check.steps, check.missing, check.problems) == (0, 16, ("16 samples missing: 0–15",))


def test_spare_samples_are_set_aside_and_not_missing(path: Path):
    spare = np.array([30, 31])
    Ledger(path).write(4, [SampleUse(((24, 29),))], spare=spare, versions=(3, 3), digests=["ab"], causes={})
    assert check_ledger(path, SAMPLES, 4) == LedgerCheck(4, 26, 6, 0, 0, 0, ())
