"""Sums and differences of small numbers, from reasoning-gym: prompts whose right answer is known.

Every row has the task's own entry as its `label`, which `rlhf_ray.reward.reasoning_gym:score` scores with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhf_ray.failures import PresetError

FORMAT_VERSION = 1
SEEDS = {"train": 0, "test": 1_000_000}
"""Far apart: reasoning-gym draws entry i with seed + i."""
COUNTS = {"train": 1024, "test": 64}
_TASK = "chain_sum"
_DIFFICULTY = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


def build(archive: Path, target: Path, report: Callable[[str], None]) -> dict[str, object]:
    """Write the prompts; `archive` is not used, an installed package makes them.

    Raises:
        PresetError: it is not installed.
    """
    try:
        import reasoning_gym
    except ModuleNotFoundError:
        raise PresetError("reasoning-gym is not installed: pip install 'rlhf-ray[verifiable]'") from None
    seen: set[str] = set()
    for side, count in COUNTS.items():
        made = iter(reasoning_gym.create_dataset(_TASK, seed=SEEDS[side], size=4 * count, **_DIFFICULTY))
        rows = [json.dumps(row) + "\n" for row in _rows(made, seen, count)]
        (target / f"prompts_{side}.jsonl").write_text("".join(rows), encoding="utf-8", newline="\n")
    report(f"made {sum(COUNTS.values())} problems")
    return {"rows": COUNTS, "reasoning_gym": metadata.version("reasoning-gym"), "difficulty": _DIFFICULTY}


def _rows(entries: Iterator[dict[str, Any]], seen: set[str], count: int) -> Iterator[dict[str, object]]:
    """The first problems that were not seen before, on either side."""
    for entry in entries:
        if entry["question"] not in seen and count:
            seen.add(entry["question"])
            count -= 1
            yield {"prompt": [{"role": "user", "content": entry["question"]}], "label": entry}
