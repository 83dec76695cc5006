"""What a check of a reward model says, and the checks that compare arrays.

A fault of the classic kind leaves no trace in a log: the scores are numbers and the loss falls. Each check therefore
compares two ways to the same score, or what is there with what was written down.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Check:
    """One check and its outcome.

    Attributes:
        name: of the check.
        passed: None where there was nothing to compare with; `found` says what was absent.
        found: what was seen, in a line.
        meaning: what a failure means for the use of the model.
    """

    name: str
    passed: bool | None
    found: str
    meaning: str


def largest_difference(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    """Largest |Δ| of two arrays of one shape; infinite where either holds a NaN.

    Raises:
        ValueError: the shapes differ.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"scores of shapes {ours.shape} and {theirs.shape} cannot be compared")
    difference = np.abs(ours - theirs)
    return float(difference.max()) if np.isfinite(difference).all() else float("inf")


def raw_scores_check(heads: NDArray[np.float64], tolerance: float) -> Check:
    """Logits are finite and differ between texts.

    Where they lie says nothing: a regression on ratings may give 0…1. An activation that somebody put behind the head
    shows in the comparisons with transformers and vLLM.

    Args:
        heads: `[N, A, K]` logits of N texts.
        tolerance: texts whose scores differ by no more have the same score.
    """
    meaning = "a policy can only learn from finite scores that tell texts apart"
    failed = int((~np.isfinite(heads)).any(axis=(1, 2)).sum())
    if failed:
        return Check("raw_scores", False, f"{failed} of {len(heads)} texts have no finite score", meaning)
    constant = np.argwhere(np.ptp(heads, axis=0) <= tolerance)
    if len(constant):
        attribute, member = constant[0]
        value = heads[0, attribute, member]
        found = f"attribute {attribute} of member {member} scores every text {value:.6g}"
        return Check("raw_scores", False, found, meaning)
    return Check("raw_scores", True, f"between {heads.min():.4g} and {heads.max():.4g}", meaning)


def probe_check(recorded: NDArray[np.float64], found: NDArray[np.float64]) -> Check:
    """The model gives the logits that the learner saw before it wrote the model.

    A learner may compute in bfloat16, whose rounding is below a tenth of the scores' spread; another head is off by
    the spread itself.

    Args:
        recorded: `[P, A, K]` from the learner.
        found: `[P, A, K]` from the directory.
    """
    allowed = 0.1 * recorded.std(axis=0) + 0.02 * np.maximum(1.0, np.abs(recorded).max(axis=0))
    difference = np.abs(found - recorded).max(axis=0)
    # Written so that NaN fails as well.
    worst = np.unravel_index(int(np.argmax(np.nan_to_num(difference - allowed, nan=np.inf))), allowed.shape)
    return Check(
        "probe",
        bool((difference <= allowed).all()),
        f"{len(recorded)} recorded texts score up to {difference[worst]:.3g} from what they did in training "
        f"(allowed {allowed[worst]:.3g})",
        "what was judged in training is not what was saved: a part was lost, made anew or changed in between",
    )


def vllm_check(ours: NDArray[np.float64], theirs: NDArray[np.float64], tolerance: float) -> Check:
    """vLLM's pooling engine gives our raw logits.

    Args:
        ours, theirs: `[N, labels]` float32 logits of the same token ids.
        tolerance: largest |Δ| allowed.
    """
    difference = largest_difference(ours, theirs)
    found = f"vLLM and our scorer differ by up to {difference:.3g} (allowed {tolerance:g})"
    if ((theirs >= 0) & (theirs <= 1)).all() and difference > tolerance:
        found += "; vLLM's scores all lie in 0…1, as with its activation left on"
    return Check("vllm", difference <= tolerance, found, "a reward served by vLLM is not the reward judged here")
