"""The ready-made reward functions."""

import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.reward.core.function_child import Batch, Failed
from rlhf_ray.reward.core.function_process import FunctionProcess
from rlhf_ray.reward.functions import contains_label, exact_match, last_number
from tests.conftest import REPOSITORY


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
    from rlhf_ray.reward.reasoning_gym import score

    entry = {"question": "2 + 2 =", "answer": "4", "metadata": {"source_dataset": "chain_sum"}}
    right, tagged, wordy, wrong = score([" 4", "so <answer>4</answer>", "it is 4", "5"], [entry] * 4)
    assert (right, tagged, wrong) == (1.0, 1.0, 0.0)
    assert 0 < wordy < 1


def blocks() -> list[str]:
    """The Python of docs/rewards.md."""
    page = (REPOSITORY / "docs" / "rewards.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def test_the_example_of_the_page_scores(tmp_path: Path):
    (tmp_path / "my_rewards.py").write_text(blocks()[0])
    batch = Batch(["p"] * 3, ["a b", "a b c d", "a"], [3, "2", None], [1] * 3, [False] * 3)
    with FunctionProcess("my_rewards:word_limit", [str(tmp_path)]) as process:
        assert process.call(batch, 60.0) == [1.0, 1 / 3, Failed("word_limit gave no score")]


def test_functions_of_trl_and_verl_are_ported_as_the_page_says():
    def trl_function(prompts, completions, answer, **others):
        return [float(completion[0]["content"] == right) for completion, right in zip(completions, answer, strict=True)]

    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        score = float(solution_str == ground_truth)
        return {"score": score} if data_source == "d" else score

    names: dict[str, Any] = {"trl_function": trl_function, "compute_score": compute_score}
    exec("\n".join(blocks()[1:]), names)
    assert names["from_trl"](["p", "p"], ["1", "2"], [{"answer": "1"}, {"answer": "1"}]) == [1.0, 0.0]
    labels = [{"data_source": "d", "ground_truth": "1"}, {"data_source": "e", "ground_truth": "1"}]
    assert names["from_verl"](["1", "2"], labels) == [1.0, 0.0]
