import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy.special import expit

from rlhf_ray.config.reward_model import GateSettings, JudgementSettings
from rlhf_ray.data.preferences import PreferencePair, PreferenceSet, Votes
from rlhf_ray.data.rows import BadRows
from rlhf_ray.reward.core.card import RewardModelCard
from rlhf_ray.reward.core.checks import Check
from rlhf_ray.reward.judge.advice import find
from rlhf_ray.reward.judge.benchmarks.cases import BenchmarkResult, Section
from rlhf_ray.reward.judge.calibration import TemperatureFit
from rlhf_ray.reward.judge.data_report import report_data
from rlhf_ray.reward.judge.evaluation import PairScores, evaluate_pairs
from rlhf_ray.reward.judge.gate import GateFigures, Verdict
from rlhf_ray.reward.judge.page import write_page
from rlhf_ray.reward.judge.policy_samples import report_best_of_n
from rlhf_ray.reward.judge.report import EvaluationReport, headline, report_json
from rlhf_ray.reward.train.run import with_figures

SETTINGS = JudgementSettings()


def made_pairs(count: int) -> tuple[list[PreferencePair], np.ndarray]:
    """Pairs with votes, sources, gaps and one more attribute, and their true score differences."""
    generator = np.random.default_rng(0)
    gaps = generator.normal(0, 2, count)
    pairs = []
    for index, gap in enumerate(gaps):
        votes = int(generator.binomial(5, expit(gap)))
        better = votes >= 2.5
        words = generator.integers(3, 30, 2)
        texts = ["- " * int(generator.integers(2)) + "good " * int(n) + str(index) for n in words]
        pairs.append(
            PreferencePair(
                prompt=f"<b>{index // 3}",
                chosen=texts[0],
                rejected=texts[1],
                chosen_probability=max(votes, 5 - votes) / 5,
                margin=None,
                weight=1.0,
                source=("chat", "film reviews & more", "code")[index % 3],
                attributes={"safety": float(gap)} if index % 2 else {},
                gap=abs(float(gap)),
                votes=Votes(max(votes, 5 - votes), min(votes, 5 - votes), 0),
                chosen_is_first=better,
                templated=False,
                place=f"pairs.jsonl:{index + 1}",
            )
        )
    return pairs, np.abs(gaps)


def made_report(*, members: int = 4, count: int = 400) -> EvaluationReport:
    generator = np.random.default_rng(1)
    pairs, gaps = made_pairs(count)
    tokens = np.array([[len(pair.chosen) // 5, len(pair.rejected) // 5] for pair in pairs])
    delta = gaps + generator.normal(0, 1, count) + 0.05 * (tokens[:, 0] - tokens[:, 1])
    centre = generator.normal(0, 1, count)
    chosen, rejected = centre + delta / 2, centre - delta / 2
    heads = np.stack([delta, delta], axis=1)
    scores = PairScores(
        chosen=chosen,
        rejected=rejected,
        chosen_attributes=heads,
        rejected_attributes=np.zeros_like(heads),
        member_differences=delta[:, None] + generator.normal(0, 0.5, (count, members)) * (members > 1),
        num_tokens=tokens,
    )
    evaluation = evaluate_pairs(pairs, scores, ("preference", "safety"), SETTINGS, seed=0)
    bad_rows = BadRows("skip", "pairs.on_bad_row")
    data = report_data(PreferenceSet(tuple(pairs), count, 0, 0, 0, bad_rows), None, training_tokens=tokens)
    both = report_data(
        PreferenceSet(tuple(pairs), count, 0, 0, 0, bad_rows), PreferenceSet(tuple(pairs[:9]), 9, 0, 0, 0, bad_rows)
    )
    reward = generator.normal(size=(60, 32))
    gold = 0.6 * reward - 0.35 * np.maximum(reward - 0.8, 0) ** 2 * 3 + generator.normal(0, 0.5, (60, 32))
    best_of_n = report_best_of_n(reward, gold, "vader")
    sections = (Section("Chat", 0.9, 100, 100), Section("Safety", None, 50, 100))
    checks = (
        Check("special_tokens", True, "pad 0, eos 2", "scores are read at the wrong token"),
        Check("probe", None, "the card holds no probes", "whether the model scores as in training is not known"),
        Check("head_saved", False, "the head is made up", "rewards would be noise"),
    )
    findings = find(
        evaluation,
        GateFigures.of(evaluation, count + 3, both.leakage),
        gate=GateSettings(),
        checks=checks,
        leakage=both.leakage,
        data=data,
        best_of_n=best_of_n,
        cut_pairs=40,
    )
    return EvaluationReport(
        name="demo <1>",
        model="runs/demo/reward_model",
        version="0123abcd",
        pairs=evaluation,
        failures={"longer than 96 tokens": 3},
        failed_texts=3,
        cut_pairs=40,
        leakage=both.leakage,
        data=data,
        benchmarks=(BenchmarkResult("reward-bench", None, sections, (), ("refusals-dangerous",), 2, 1),),
        best_of_n=best_of_n,
        checks=checks,
        findings=findings,
        verdict=Verdict.of(findings),
        wall_s=12.0,
    )


@pytest.fixture(scope="module")
def report() -> EvaluationReport:
    return made_report()


@pytest.fixture(scope="module")
def page(report, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("page") / "evaluation.html"
    write_page(path, report)
    return path.read_text()


class _Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.headings: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value[:1] != "#"]

    def handle_startendtag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value[:1] != "#"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.headings if self.open[-1:] == ["h2"] else self.text).append(data.strip())


def test_the_page_is_one_sound_file_without_outside_hosts(page):
    elements = _Elements(page)
    assert elements.open == []
    assert elements.addresses == []
    assert not re.search(r"@import|url\((?!#)", page)
    assert "<1>" not in page  # names and texts are escaped
    assert "demo &lt;1&gt;" in page


def test_the_page_goes_from_the_verdict_over_what_to_change_to_the_figures(page, report):
    elements = _Elements(page)
    assert elements.headings == [
        "What to change first",
        "Accuracy",
        "Calibration",
        "Scores and margins",
        "Length and format",
        "Disagreement",
        "Under a policy",
        "Benchmarks",
        "Integrity",
        "Data",
    ]
    first = report.findings[0]
    assert (first.name, first.severity) == ("head_saved", "refusal")
    places = [page.index(text) for text in ("Refused", "head_saved", "What to change first", first.found, "<svg")]
    assert places == sorted(places)
    for each in report.findings:
        assert {each.found, each.meaning} <= set(elements.text)
        assert not each.lever or each.lever in elements.text
    assert f"{100 * report.pairs.accuracy.value:.1f} %" in elements.text
    assert page.count("<svg") == 11


def test_failed_checks_come_first(page):
    assert page.index("head_saved</td>") < page.index("probe</td>") < page.index("special_tokens</td>")


def test_plots_take_the_colours_of_the_page(page):
    pictures = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "var(--blue)" in pictures
    assert not re.search(r"(?:fill|stroke): #", pictures)


@pytest.mark.filterwarnings("error")
def test_what_was_not_looked_at_has_no_section(tmp_path):
    bare = made_report(members=1, count=30)
    bare = replace(
        bare,
        failures={},
        failed_texts=0,
        cut_pairs=0,
        leakage=None,
        data=None,
        benchmarks=(),
        best_of_n=None,
        checks=(),
        findings=(),
    )
    write_page(tmp_path / "page.html", replace(bare, verdict=None))
    page = (tmp_path / "page.html").read_text()
    assert _Elements(page).headings == ["Accuracy", "Calibration", "Scores and margins", "Length and format"]
    assert "Not judged" in page
    write_page(tmp_path / "page.html", replace(bare, verdict=Verdict(True, ())))
    assert "Released" in (tmp_path / "page.html").read_text()


def test_pairs_that_allow_no_figure_still_have_a_page(tmp_path):
    pairs, _ = made_pairs(3)
    pairs = [replace(pair, chosen_probability=0.5, gap=None, source=None, chosen_is_first=None) for pair in pairs]
    flat = np.zeros(3)
    scores = PairScores(flat, flat, np.zeros((3, 1)), np.zeros((3, 1)), np.zeros((3, 1)), np.full((3, 2), 5))
    evaluation = evaluate_pairs(pairs, scores, ("preference",), SETTINGS, seed=0)
    report = EvaluationReport(
        "ties",
        "model",
        "",
        evaluation,
        {},
        0,
        0,
        None,
        None,
        (),
        None,
        (),
        find(evaluation, GateFigures.of(evaluation, 3, None)),
        None,
        1.0,
    )
    write_page(tmp_path / "page.html", report)
    assert json.loads(report_json(report))["pairs"]["accuracy"]["value"] is None


def test_json_holds_everything_and_no_number_that_is_not_finite(report):
    read = json.loads(report_json(report))
    assert read["pairs"]["accuracy"]["value"] == report.pairs.accuracy.value
    assert read["best_of_n"]["curve"]["peak_n"] == report.best_of_n.curve.peak_n
    assert [each["found"] for each in read["findings"]] == [each.found for each in report.findings]
    with pytest.raises(ValueError, match="JSON"):
        report_json(replace(report, wall_s=float("nan")))


def test_the_headline_goes_into_a_card(report):
    figures = headline(report.pairs)
    assert figures["accuracy"] == report.pairs.accuracy.value
    assert figures["calibration_error_scaled"] == report.pairs.scaled.ece
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


@pytest.mark.parametrize("at_bound", [False, True])
def test_a_temperature_that_is_no_estimate_does_not_go_with_the_model(report, at_bound):
    """At its lower bound it would multiply every reward by a hundred."""
    found = TemperatureFit(0.01 if at_bound else 1.7, at_bound, 0.3)
    card = RewardModelCard(
        version="", base_model="b", max_length=9, append_eos=True, chat_template=None, training_data=""
    )
    judged = with_figures(card, replace(report.pairs, temperature=found))
    assert judged.temperature == (1.0 if at_bound else 1.7)
    assert judged.evaluation["temperature"] == (None if at_bound else 1.7)
