"""A draw depends on its key and on nothing else."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from rlhf_ray.randomness import batch_rows, keyed_generator, keyed_seed


def test_a_key_gives_the_same_seed_in_another_process():
    key = "keyed_seed(7, 'sample', 3, 12, 1)"
    command = f"from rlhf_ray.randomness import keyed_seed; print({key})"
    out = subprocess.run(
        [sys.executable, "-c", command],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={"PYTHONHASHSEED": "1"},
    )
    assert int(out.stdout) == keyed_seed(7, "sample", 3, 12, 1)


def test_different_keys_give_different_seeds():
    keys = [
        (seed, name, step, prompt) for seed in range(3) for name in "ab" for step in range(20) for prompt in range(20)
    ]
    assert len({keyed_seed(seed, *key) for seed, *key in keys}) == len(keys)
    # Neither the bounds between parts nor their types may blur.
    assert keyed_seed(0, "a", 12) != keyed_seed(0, "a1", 2)
    assert keyed_seed(0, 1, 2) != keyed_seed(0, 12)
    assert keyed_seed(0, "1") != keyed_seed(0, 1)


def test_seeds_fit_what_vllm_and_torch_take():
    seeds = [keyed_seed(0, index) for index in range(2000)]
    assert min(seeds) >= 0
    assert max(seeds) < 2**63
    assert max(seeds) > 2**62, "all 63 bits are used"


def test_draws_do_not_depend_on_their_order():
    one = [keyed_generator(1, "x", index).random() for index in range(5)]
    other = [keyed_generator(1, "x", index).random() for index in reversed(range(5))]
    assert one == other[::-1]
    assert np.unique(one).size == 5


def test_every_pass_over_the_rows_sees_each_once():
    drawn = [row for step in range(9) for row in batch_rows(12, 4, seed=3, step=step)]
    passes = [drawn[start : start + 12] for start in range(0, 36, 12)]
    assert all(sorted(each) == list(range(12)) for each in passes)
    assert passes[0] != passes[1]
    # A batch that reaches over the end of a pass goes on in the next one.
    uneven = [row for step in range(12) for row in batch_rows(12, 5, seed=3, step=step)]
    assert uneven[:36] == drawn
