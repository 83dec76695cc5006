"""The gate's verdict on figures and checks: each limit, its key, and what it means."""

import math
import re
from dataclasses import replace

import pytest

from rlhf_ray.config.reward_model import GateSettings
from rlhf_ray.reward.core.checks import Check
from rlhf_ray.reward.judge.bias import NOTHING_TO_PAY_FOR, LengthBias, Overpayment
from rlhf_ray.reward.judge.gate import GateFigures, judge
from rlhf_ray.reward.judge.groups import UNKNOWN, Estimate, Proportion

NOT_COUNTED = Proportion(None, None, None, 0)


def length(paid: Overpayment, longer_preferred: Proportion = Proportion(0.6, 0.5, 0.7, 390)) -> LengthBias:
    return LengthBias(paid, NOT_COUNTED, NOT_COUNTED, longer_preferred, 3.0)


def overpaid(value: float, half: float = 0.1) -> LengthBias:
    return length(Overpayment(Estimate(1.5, 1.2, 1.8), Estimate(value, value - half, value + half), 0.1))


SOUND = GateFigures(
    prompts=80,
    accuracy=Proportion(0.8, 0.76, 0.84, 400),
    calibration_excess=Estimate(0.01, -0.02, 0.04),
    length=overpaid(0.1),
    leaked_share=0.0,
    failed_share=0.0,
)
CHECK = Check("probe", True, "fine", "what was judged is not what was saved")


def test_a_sound_model_is_released():
    verdict = judge(SOUND, [CHECK], GateSettings())
    assert (verdict.released, verdict.refusals) == (True, ())


def test_figures_on_their_limits_are_released():
    settings = GateSettings(min_accuracy=0.75, max_leaked_share=0.1, max_failed_share=0.2)
    limits = GateFigures(
        prompts=settings.min_prompts,
        accuracy=replace(SOUND.accuracy, count=settings.min_pairs),
        calibration_excess=Estimate(0.02, 0.0, settings.max_calibration_excess),
        length=overpaid(settings.max_overpaid_length - 0.1),
        leaked_share=0.1,
        failed_share=0.2,
    )
    assert judge(limits, [], settings).released


@pytest.mark.parametrize(
    ("changed", "refusal"),
    [
        (
            {"accuracy": Proportion(1.0, 0.6, 1.0, 6)},
            "^evidence: There are 6 held-out pairs .*gate.min_pairs is 300",
        ),
        ({"prompts": 9}, "^evidence: There are 400 held-out pairs .* 9 prompts; .*gate.min_prompts 10"),
        (
            {"accuracy": Proportion(0.6, 0.5, 0.7, 400)},
            r"^accuracy: Accuracy is 60\.0 % \(50\.0–70\.0 %\) on 400 pairs; .*gate\.min_accuracy",
        ),
        ({"accuracy": Proportion(0.2, 0.15, 0.25, 400)}, "^accuracy: .* below chance. The labels are flipped"),
        ({"accuracy": Proportion(1.0, None, None, 400)}, r"^accuracy: Accuracy is 100\.0 % on 400 pairs"),
        ({"accuracy": Proportion(math.nan, math.nan, math.nan, 400)}, "^accuracy: "),
        (
            {"calibration_excess": Estimate(0.03, 0.0, 0.051)},
            r"^calibration: .* 0\.030 \(0\.000 to 0\.051\).*gate\.max_calibration_excess 0\.05",
        ),
        ({"calibration_excess": UNKNOWN}, "^calibration: "),
        ({"calibration_excess": Estimate(math.nan, math.nan, math.nan)}, "^calibration: "),
        (
            {"length": overpaid(0.31)},
            r"^length: Of .* 0\.310 \(0\.210 to 0\.410\) .*gate\.max_overpaid_length 0\.4\. .*longer",
        ),
        ({"length": overpaid(math.nan)}, "^length: "),
        (
            {"length": length(Overpayment(Estimate(0.4, -0.1, 0.9), UNKNOWN, None))},
            r"^length: Between responses of the same length .* 0\.400 \(-0\.100 to 0\.900\)",
        ),
        (
            {"length": length(NOTHING_TO_PAY_FOR, Proportion(0.97, 0.91, 0.99, 390))},
            r"^length: People prefer the longer response in 97\.0 % \(91\.0–99\.0 %\) on 390 pairs",
        ),
        ({"leaked_share": 0.02}, r"^leakage: 2\.0 % of the pairs.*gate\.max_leaked_share is 0\.0 %"),
        ({"leaked_share": math.nan}, "^leakage: "),
        ({"failed_share": 0.005}, r"^failures: 0\.5 % of the pairs.*gate\.max_failed_share"),
        ({"failed_share": math.nan}, "^failures: "),
    ],
)
def test_one_figure_beyond_its_limit_is_one_refusal_that_names_it(changed: dict[str, object], refusal: str):
    verdict = judge(replace(SOUND, **changed), [CHECK], GateSettings())
    assert not verdict.released
    [line] = verdict.refusals
    assert re.search(refusal, line), line
    assert "\n" not in line
    assert ". " in line, "what it means is missing"


def test_what_was_not_asked_refuses_nothing():
    """Responses that never differ in length; a model without a record of its training; length paid too little."""
    assert judge(replace(SOUND, length=length(NOTHING_TO_PAY_FOR), leaked_share=None), [], GateSettings()).released
    assert judge(replace(SOUND, length=overpaid(-0.6)), [], GateSettings()).released


@pytest.mark.parametrize(("differ", "released"), [(29, True), (30, False)])
def test_a_few_responses_that_differ_in_length_prove_nothing(differ: int, released: bool):
    few = replace(overpaid(0.9), longer_preferred=Proportion(0.6, 0.3, 0.8, differ))
    assert judge(replace(SOUND, length=few), [], GateSettings()).released is released


def test_nothing_counted_is_no_evidence():
    verdict = judge(replace(SOUND, accuracy=NOT_COUNTED), [], GateSettings())
    assert [line.split(":")[0] for line in verdict.refusals] == ["evidence", "accuracy"]


def test_every_failed_check_is_listed_before_the_figures():
    failed, absent = replace(CHECK, passed=False, found="off by 3"), replace(CHECK, passed=None)
    verdict = judge(replace(SOUND, failed_share=0.5), [CHECK, failed, absent, failed], GateSettings())
    assert verdict.refusals[:2] == ("probe: Off by 3. What was judged is not what was saved.",) * 2
    assert verdict.refusals[2].startswith("failures: ")
    assert len(verdict.refusals) == 3
