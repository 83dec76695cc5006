from dataclasses import replace

import numpy as np
import pytest

from rlhf_ray.reward.judge.accuracy import StratumAccuracy
from rlhf_ray.reward.judge.advice import find
from rlhf_ray.reward.judge.bias import FormatArtefact, LengthBias, Overpayment
from rlhf_ray.reward.judge.calibration import Calibration, SamplingFloor, TemperatureFit
from rlhf_ray.reward.judge.disagreement import DisagreementReport
from rlhf_ray.reward.judge.evaluation import AttributeAccuracy, Histogram, PairEvaluation
from rlhf_ray.reward.judge.findings import Finding, interval_text
from rlhf_ray.reward.judge.gate import GateFigures
from rlhf_ray.reward.judge.groups import UNKNOWN, Estimate, Proportion
from rlhf_ray.reward.judge.label_noise import RaterCeiling
from rlhf_ray.reward.judge.leakage import Leakage, Matches
from rlhf_ray.reward.judge.policy_samples import report_best_of_n

NONE = Matches(0, 0.0, ())


def share(value: float, half: float = 0.01, count: int = 3000) -> Proportion:
    return Proportion(value, value - half, value + half, count)


def calibrated(ece: float = 0.02) -> Calibration:
    excess = Estimate(ece - 0.018, ece - 0.025, ece - 0.011)
    return Calibration(ece, SamplingFloor(0.018, 0.025), excess, (), 1.0, 0.3, 0.1, 3000)


def overpaid(value: float, half: float = 0.05) -> Overpayment:
    return Overpayment(Estimate(1.5, 1.2, 1.8), Estimate(value, value - half, value + half), 0.1)


NOT_BEYOND_LENGTH = Overpayment(Estimate(0.3, -0.1, 0.7), UNKNOWN, None)


def disagreement(auroc: float, half: float = 0.04) -> DisagreementReport:
    return DisagreementReport(Estimate(auroc, auroc - half, auroc + half), 0.1, (), (), 3000, 300)


SOUND = PairEvaluation(
    pairs=3000,
    prompts=1500,
    ties=0,
    accuracy=share(0.9),
    by_source=(StratumAccuracy("chat", share(0.91, 0.02)), StratumAccuracy("code", share(0.88, 0.02))),
    by_gap=(StratumAccuracy("[0, 1)", share(0.7, 0.03)), StratumAccuracy("[1, 9]", share(0.97))),
    by_attribute=(AttributeAccuracy("preference", share(0.9)), AttributeAccuracy("safety", share(0.8))),
    calibration=calibrated(),
    scaled=calibrated(),
    temperature=TemperatureFit(1.1, False, 0.3),
    vote_accuracy=None,
    ceiling=RaterCeiling(0.92, 0.86, 1000, 3000),
    scores=Histogram((0.0, 1.0), (3000,), 0.1, 1.5),
    margins=Histogram((0.0, 1.0), (3000,), 2.0, 1.5),
    length=LengthBias(overpaid(0.05), share(0.91), share(0.88), share(0.52), 1.0),
    formats=(FormatArtefact("headings", 500, share(0.5), overpaid(0.1)),),
    position=share(0.51),
    disagreement=disagreement(0.75),
    max_tokens=90,
)


def found(evaluation: PairEvaluation = SOUND, asked_pairs: int | None = None, **others) -> tuple[Finding, ...]:
    """Without the gate."""
    figures = GateFigures.of(evaluation, asked_pairs or evaluation.pairs, others.get("leakage"))
    return find(evaluation, figures, **others)


def only(evaluation: PairEvaluation = SOUND, **others) -> Finding:
    (finding,) = found(evaluation, **others)
    return finding


def test_nothing_is_found_in_a_sound_model():
    assert found(leakage=Leakage(NONE, NONE, NONE, NONE)) == ()


@pytest.mark.parametrize(
    ("changes", "severity", "lever"),
    [
        ({"accuracy": share(0.45)}, "high", "which column is the preferred one"),
        ({"accuracy": share(0.505)}, "high", "More training pairs"),
        ({"vote_accuracy": 0.84}, "medium", "larger backbone"),
        ({"vote_accuracy": 0.7}, "high", "larger backbone"),
        ({"accuracy": share(0.9, 0.04)}, "low", "About 5,300 held-out pairs"),
        ({"by_source": (StratumAccuracy("code", share(0.7, 0.05)),)}, "medium", "these sources"),
        ({"by_source": (StratumAccuracy("code", share(0.4, 0.05)),)}, "high", "look at their labels"),
        ({"by_gap": (StratumAccuracy("[0, 1)", share(0.52, 0.04)), SOUND.by_gap[1])}, "low", "pairs.min_gap"),
        (
            {"by_attribute": (SOUND.by_attribute[0], AttributeAccuracy("safety", share(0.52, 0.03)))},
            "medium",
            "aggregation.attributes",
        ),
        ({"calibration": calibrated(0.1)}, "low", "temperature stored with the model"),
        ({"calibration": calibrated(0.1), "scaled": calibrated(0.08)}, "medium", "training.label_smoothing"),
        (
            {"length": replace(SOUND.length, overpayment=overpaid(0.3))},
            "medium",
            "aggregation.length_penalty: fitted",
        ),
        ({"length": replace(SOUND.length, overpayment=overpaid(0.5))}, "high", "aggregation.length_penalty: fitted"),
        ({"length": replace(SOUND.length, overpayment=NOT_BEYOND_LENGTH)}, "high", "Pairs balanced in length"),
        ({"formats": (replace(SOUND.formats[0], overpayment=overpaid(0.3)),)}, "medium", "formatting stripped"),
        ({"disagreement": disagreement(0.52)}, "low", "ensemble.kind: independent"),
        ({"ceiling": RaterCeiling(0.7, 0.6, 1000, 3000)}, "medium", "More raters"),
        ({"position": share(0.6)}, "low", "random order"),
        ({"scores": replace(SOUND.scores, mean=-4.0)}, "low", "training.centering"),
    ],
)
def test_each_finding_has_its_severity_and_lever(changes, severity, lever):
    finding = only(replace(SOUND, **changes))
    assert finding.severity == severity
    assert lever in finding.lever


def test_what_sampling_explains_is_no_finding():
    wide = 0.3
    assert (
        found(
            replace(
                SOUND,
                by_source=(
                    StratumAccuracy("code", share(0.8, wide)),
                    StratumAccuracy("rare", share(0.1, 0.1, count=5)),
                ),
                length=replace(SOUND.length, overpayment=overpaid(0.25, wide)),
                formats=(replace(SOUND.formats[0], overpayment=overpaid(0.25, wide)),),
                scaled=replace(calibrated(0.05), excess=Estimate(0.025, -0.01, 0.06)),
                position=share(0.6, wide),
            )
        )
        == ()
    )


def test_what_is_paid_too_little_is_no_finding():
    changed = replace(
        SOUND,
        length=replace(SOUND.length, overpayment=overpaid(-0.5), accuracy_shorter_preferred=share(0.7)),
        formats=(replace(SOUND.formats[0], overpayment=overpaid(-0.5)),),
    )
    assert found(changed) == ()


def test_what_casts_doubt_on_every_other_number_comes_first():
    some = Matches(30, 0.1, ("pairs.jsonl:1",))
    bad = replace(SOUND, accuracy=share(0.45), position=share(0.7))
    several = found(bad, asked_pairs=3002, leakage=Leakage(NONE, some, some, some), cut_pairs=300)
    assert [(each.name, each.severity) for each in several] == [
        ("accuracy", "high"),
        ("leakage", "high"),
        ("failures", "medium"),
        ("cut texts", "medium"),
        ("labels", "low"),
    ]
    assert several[1].found.startswith("10.0 % of the pairs")
    assert only(leakage=Leakage(NONE, NONE, NONE, some)).lever.startswith("Split by prompt")


def samples(gold_of_reward, *, prompts: int = 80, spread: float = 1.0):
    generator = np.random.default_rng(0)
    reward = spread * generator.normal(size=(prompts, 32)) + 5 * (spread < 1) * generator.normal(size=(prompts, 1))
    return report_best_of_n(reward, gold_of_reward(reward), "judge")


def test_a_peak_inside_the_range_says_where_to_stop_and_how():
    report = samples(lambda reward: reward - 0.8 * np.maximum(reward - 0.8, 0) ** 2)
    finding = only(replace(SOUND, disagreement=None), best_of_n=report)
    peak = report.curve.peak_sqrt_kl
    assert f"(√KL {peak:.2f})" in finding.found
    assert f"algorithm.kl.stop_above near {peak**2:.1f} nats" in finding.lever
    assert "ensemble.members" in finding.lever
    assert "ensemble.members" not in only(best_of_n=report).lever


def test_a_reward_that_keeps_paying_is_no_finding_and_one_that_never_pays_is():
    assert found(best_of_n=samples(lambda reward: reward)) == ()
    never = found(best_of_n=samples(lambda reward: -reward))
    assert ["worse than a random sample" in never[0].found, "rank correlation" in never[1].found] == [True, True]
    assert {each.severity for each in never} == {"high"}


def test_a_fall_that_chance_explains_is_no_over_optimisation():
    report = samples(lambda reward: reward - 0.8 * np.maximum(reward - 0.8, 0) ** 2)
    doubtful = replace(report.curve, drop=Estimate(report.curve.drop.value, -0.01, 1.0))
    assert found(best_of_n=replace(report, curve=doubtful)) == ()


def test_a_flat_objective_under_the_policy():
    flat = samples(lambda reward: reward)
    nearly = only(best_of_n=replace(flat, spread=replace(flat.spread, flat_prompts=0.2)))
    assert "20.0 % of the prompts" in nearly.found
    between = only(best_of_n=samples(lambda reward: reward, spread=0.1))
    assert "lies between prompts" in between.found


def test_intervals_in_words():
    assert interval_text(share(0.9)) == "90.0 % (89.0–91.0 %)"
    assert interval_text(Proportion(0.5, None, None, 3)) == "50.0 %"
    assert interval_text(Proportion(None, None, None, 0)) == "–"
