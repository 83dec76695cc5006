"""What a reward model's scores looked like when it was judged."""

import json
from pathlib import Path

import numpy as np
import pytest

from rlhf_ray.failures import BadInput
from rlhf_ray.randomness import keyed_generator
from rlhf_ray.reward.core.card import RewardModelCard
from rlhf_ray.reward.core.reference_scores import REFERENCE_NAME, Distribution, ReferenceScores


def lengths(count: int) -> np.ndarray:
    """Of texts of which many are cut at 60 tokens."""
    return np.minimum(np.rint(keyed_generator(0, "lengths").lognormal(3.4, 0.7, count)), 60.0)


@pytest.mark.parametrize("values", [keyed_generator(0, "scores").normal(1, 2, 3000), lengths(3000), np.ones(5)])
def test_shares_are_exact_and_close_to_each_other(values: np.ndarray):
    known = Distribution.of(values)
    assert known.shares == tuple(np.mean(values <= point) for point in known.points)
    assert known.mean == pytest.approx(values.mean())
    assert known.std == pytest.approx(values.std())
    # Between two points lies little, wherever a tie does not forbid it: the tie itself is fenced in.
    for point, step in zip(known.points, np.diff(known.shares, prepend=0.0), strict=True):
        assert step - np.mean(values == point) <= 1 / 200 + 1e-9


def test_texts_without_a_score_are_left_out_and_counted():
    reference = ReferenceScores.of([1.0, np.nan, 3.0], [4, 500, 6], "v")
    assert (reference.texts, reference.failed_texts) == (2, 1)
    assert (reference.score.mean, reference.score.points[-1]) == (2.0, 3.0)
    assert reference.length.mean == 5.0
    with pytest.raises(ValueError, match="no text has a score"):
        ReferenceScores.of([np.nan], [3], "v")
    with pytest.raises(ValueError, match="shapes"):
        ReferenceScores.of([1.0, 2.0], [3], "v")


def test_it_is_read_as_it_was_written_and_leaves_the_version_alone(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    card = RewardModelCard(
        version="", base_model="b", max_length=8, append_eos=False, chat_template=None, training_data=""
    )
    version = card.version_of(tmp_path)
    reference = ReferenceScores.of(keyed_generator(0, "scores").normal(size=500), lengths(500), version)
    assert ReferenceScores.load(str(tmp_path), "model") is None
    reference.save(tmp_path)
    assert ReferenceScores.load(str(tmp_path), "model") == reference
    assert card.version_of(tmp_path) == version
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", REFERENCE_NAME]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"points": [2.0, 1.0], "shares": [0.5, 1.0]}, "do not increase"),
        ({"points": [1.0, 2.0], "shares": [0.5, 0.9]}, "do not rise to 1"),
        ({"points": [1.0], "shares": [0.5, 1.0]}, "do not go together"),
        ({"points": [], "shares": []}, "score.points"),
        ({"std": -1.0}, "score.std"),
        ({"mean": "wide"}, "score.mean"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, change: dict[str, object], cause: str):
    reference = ReferenceScores.of([1.0, 2.0], [4, 6], "v").model_dump()
    reference["score"] |= change
    (tmp_path / REFERENCE_NAME).write_text(json.dumps(reference))
    found = rf"models\.0\.path: '.*{REFERENCE_NAME}' is not a file of reference scores .*{cause}"
    with pytest.raises(BadInput, match=found):
        ReferenceScores.load(str(tmp_path), "models.0.path")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path):
    (tmp_path / REFERENCE_NAME).write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match=REFERENCE_NAME):
        ReferenceScores.load(str(tmp_path), "model")
