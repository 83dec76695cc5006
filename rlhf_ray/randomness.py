"""Every random draw has a key: what is drawn, never when or in which order.

A key is the run's seed and a path such as `("sample", step, prompt_id, sample)`. The same key gives the same
draw in a run, in its resume and in a replay, on any machine.
"""

from __future__ import annotations

import hashlib

import numpy as np


def keyed_seed(seed: int, *key: str | int) -> int:
    """A seed of 63 bits (what vLLM and torch take) for one draw.

    Args:
        seed: the run's seed.
        key: what is drawn, from the general to the particular; strings and integers.
    """
    unknown = [part for part in key if not isinstance(part, str | int)]
    if unknown:
        raise TypeError(f"a key is made of str and int; {unknown[0]!r} is a {type(unknown[0]).__name__}")
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in key)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def keyed_generator(seed: int, *key: str | int) -> np.random.Generator:
    """A NumPy generator for the draws under one key."""
    return np.random.Generator(np.random.Philox(keyed_seed(seed, *key)))


def batch_rows(num_rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The rows of a step: entries step·batch_size … of one keyed permutation after another.

    Args:
        step: from 0.
    """
    rows: list[int] = []
    for entry in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(entry, num_rows)
        if not rows or place == 0:
            order = keyed_generator(seed, "row-order", epoch).permutation(num_rows)
        rows.append(int(order[place]))
    return rows
