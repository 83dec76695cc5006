import json
import re
from html.parser import HTMLParser

import pytest

from rlhf_ray.tracking.report import SamplePair, plot_loss, plot_ppo, write_samples, write_samples_page

PNG = b"\x89PNG\r\n\x1a\n"
SUMMARY = {
    "held_out": {
        "prompts": 128,
        "vader_before": 0.06,
        "vader_after": 0.41,
        "reward_before": 0.5,
        "reward_after": -0.5,
        "reward_std_before": 0.5,
    },
    "reward_model": {"accuracy": 0.884, "pairs": 3200},
    "kl/reference": 8.21,
    "wall_s": 683.4,
}
PAIRS = [
    SamplePair("The film <b>", "is <script>alert(1)</script>\ndull", "is a delight", -1.0, 2.0, -0.4, 0.8),
    SamplePair("Unscored", "x", "y", None, 1.0, None, None),
]


def rows(**columns):
    return [{"step": step, **{name: value(step) for name, value in columns.items()}} for step in range(1, 9)]


@pytest.fixture
def metrics_path(tmp_path):
    def write(rows):
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "content",
    [
        rows(
            **{
                "reward/mean": float,
                "reward/std": lambda _: 0.3,
                "kl/reference": lambda step: -0.1 * step,
                "kl/coefficient": lambda _: 0.05,
                "response/length_mean": lambda _: 20.0,
                "policy/entropy": lambda _: 2.0,
                "time/generate_s": lambda _: 2.0,
                "time/train_s": lambda _: 3.0,
                "time/step_s": lambda _: 6.0,
            }
        ),
        [{"step": 1, "reward/mean": None, "reward/std": None}],
        [],
    ],
)
def test_the_ppo_plot_copes_with_whole_sparse_and_empty_runs(metrics_path, tmp_path, content):
    plot_ppo(metrics_path(content), tmp_path / "training.png", "demo")
    assert (tmp_path / "training.png").read_bytes().startswith(PNG)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "content",
    [
        rows(loss=lambda step: 1 / step, accuracy=lambda step: 0.5 + step / 20),
        rows(loss=lambda step: 1 / step if step != 3 else None, lr=lambda step: 1e-5),
        [],
    ],
)
def test_the_loss_plot_serves_reward_models_and_sft(metrics_path, tmp_path, content):
    plot_loss(metrics_path(content), tmp_path / "training.png", "demo")
    assert (tmp_path / "training.png").read_bytes().startswith(PNG)


def test_samples_are_one_object_a_prompt(tmp_path):
    write_samples(tmp_path / "samples.jsonl", PAIRS)
    first, second = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert first == {
        "prompt": "The film <b>",
        "before": PAIRS[0].before,
        "after": "is a delight",
        "reward_before": -1.0,
        "reward_after": 2.0,
        "judge_before": -0.4,
        "judge_after": 0.8,
    }
    assert second["reward_before"] is None


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def page(tmp_path):
    def make(summary, pairs, plot=None):
        path = tmp_path / "samples.html"
        write_samples_page(path, "demo & co", summary, pairs, plot)
        return path.read_text()

    return make


def test_the_page_shows_both_sides_and_is_safe_from_what_a_model_writes(page):
    text = page(SUMMARY, PAIRS)
    parsed = Page(text)
    assert "script" not in parsed.tags
    assert PAIRS[0].before in parsed.text
    assert "The film <b>" in parsed.text
    assert text.count('class="sample"') == 2
    assert re.findall(r'<span class="chip (\w+)"[^>]*>(.*?)</span>', text) == [
        ("good", "reward -1.00"),
        ("good", "judge -0.40"),
        ("good", "reward +2.00"),
        ("good", "judge +0.80"),
        ("good", "reward +1.00"),
    ]


def test_scores_are_coloured_against_the_mean_before(page):
    pairs = [SamplePair("p", "b", "a", 0.0, 3.0), SamplePair("q", "b", "a", 2.0, 0.5)]
    assert re.findall(r'<span class="chip (\w+)" style="--strength: (\d+)%', page({}, pairs)) == [
        ("bad", "32"),
        ("good", "55"),
        ("good", "32"),
        ("bad", "21"),
    ]


def test_the_page_needs_nothing_from_outside(page, tmp_path):
    (tmp_path / "training.png").write_bytes(PNG)
    text = page(SUMMARY, PAIRS, tmp_path / "training.png")
    assert [address[:22] for address in Page(text).addresses] == ["data:image/png;base64,"]
    assert "http" not in text
    assert "prefers-color-scheme: dark" in text


def test_headline_figures_are_those_of_the_summary(page):
    text = page(SUMMARY, PAIRS)
    assert re.findall(r'class="value (\w*)">(.*?)<', text) == [
        ("bad", "-1.00"),
        ("good", "+0.35"),
        ("", "8.2 nats"),
        ("", "88.4%"),
        ("", "11:23 min"),
    ]
    assert "+0.50 before, -0.50 after (-2.00 std)" in text
    assert "on 3,200 held-out pairs" in text


def test_a_run_without_evaluation_has_a_page_too(page):
    assert not {"section", "article", "img"} & set(Page(page({"wall_s": None}, [])).tags)
