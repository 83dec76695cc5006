"""A reward model under a policy: what it does with several samples of each prompt.

Pairs say whether a reward model agrees with people on the texts that people compared. A policy asks something else:
does the score tell *its own* answers to one prompt apart, and is the best-scored one the better one? So the same
samples are scored by the reward model (proxy) and by a second judge (gold). Three figures answer: the best-of-n curve,
the spread of the scores within a prompt (a small one leaves a policy little to follow, however accurate the model is;
Razin et al. 2025, "What makes a reward model a good teacher?"), and the rank correlation of both scores there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from rlhf_ray.config.reward_model import BestOfNSettings
from rlhf_ray.config.settings import ClusterSettings, WeightSettings
from rlhf_ray.data.chat import parse_messages
from rlhf_ray.data.prompts import PromptSet, load_prompts
from rlhf_ray.data.rows import NoBadRows, Row, RowError, first_present, number_value, read_rows, text_value
from rlhf_ray.failures import BadInput
from rlhf_ray.models.buckets import UNTRAINED
from rlhf_ray.models.loading import (
    check_language_model,
    check_tokenizer_fits,
    load_policy_tokenizer,
    read_model_facts,
)
from rlhf_ray.reward.core.encoding import Encoded, RewardEncoding
from rlhf_ray.reward.core.evaluator import vader_judge
from rlhf_ray.reward.core.protocol import Conversation
from rlhf_ray.reward.judge.best_of_n import (
    BestOfNCurve,
    OverOptimisation,
    best_of_n_curve,
    expected_win_rate,
    fit_overoptimisation,
    win_rate,
)
from rlhf_ray.reward.judge.groups import mean_with_interval
from rlhf_ray.roles.generator import Generator, ShardPlan, cut_into_shards
from rlhf_ray.rollout import FINISH_LENGTH, Rollout
from rlhf_ray.runtime.cluster import RoleRequest
from rlhf_ray.runtime.learner_group import role_group
from rlhf_ray.tracking.tracker import Tracker

SCORED_FLAT = 0.01
"""A prompt is scored flat where its scores lie within this share of the standard deviation of all scores."""

TextScorer = Callable[[Sequence[Encoded], NDArray[np.int64]], NDArray[np.float64]]
"""Scores of whole texts and the numbers of their prompts, NaN for those without one; equal texts of a prompt have
bit-for-bit equal scores."""


@dataclass(frozen=True, eq=False)
class PolicySamples:
    """N responses of a policy to each of P prompts.

    Attributes:
        prompts: `[P]`. The text of one that is chat messages is for reading only.
        responses: `[P][N]`; one may be empty.
        places: `[P]` where each prompt comes from.
        judge: `[P, N]` scores of a second judge that came with the samples, or None.
        truncated_share: share of the responses cut off at the token limit; None where the samples do not say.
        num_surplus: responses left out because other prompts have fewer: the last ones of their rows.
        num_skipped: prompts left out because they cannot be used (`prompts.on_bad_row: skip`).
    """

    prompts: tuple[Conversation, ...]
    responses: tuple[tuple[str, ...], ...]
    places: tuple[str, ...]
    judge: NDArray[np.float64] | None = None
    truncated_share: float | None = None
    num_surplus: int = 0
    num_skipped: int = 0

    @property
    def samples_per_prompt(self) -> int:
        return len(self.responses[0])


@dataclass(frozen=True)
class WinRate:
    """P(the best of n beats another sample of its prompt), both judged by the scorer that picked it.

    Attributes:
        value: equal scores count half.
        without_ties: n/(n + 1), what it is where no two samples have the same score.
    """

    n: int
    value: float
    without_ties: float


@dataclass(frozen=True)
class RewardSpread:
    """Where the scores vary. A policy can only learn from differences within a prompt.

    Attributes:
        within_prompt_std: mean over prompts of the (N − 1) standard deviation of a prompt's scores.
        between_prompt_share: share of the total variance that lies between prompts: the intraclass correlation ICC(1)
            (Shrout & Fleiss 1979), not below 0; None with one prompt, or where all scores are equal.
        flat_prompts: share of the prompts whose scores are all equal, or nearly (`SCORED_FLAT`).
    """

    within_prompt_std: float
    between_prompt_share: float | None
    flat_prompts: float


@dataclass(frozen=True)
class RankAgreement:
    """How proxy and gold order the samples of one prompt.

    Attributes:
        correlation: Spearman's, averaged over prompts; None where there is no prompt in which both vary.
        low, high: interval over prompts.
        prompts: number of prompts in which both vary.
    """

    correlation: float | None
    low: float | None
    high: float | None
    prompts: int


@dataclass(frozen=True)
class BestOfNReport:
    """A reward model under a policy.

    Attributes:
        judge: who judged the picks.
        prompts: that every figure is over.
        failed_prompts: left out, for a sample of theirs has no score by proxy or gold.
        curve: at n = 1, 2, 4, … and N.
        fit: None with fewer than two points beyond n = 1.
        win_rates: at the n of the curve below N.
        truncated_share: share of the responses cut off at the token limit, of all prompts; None where it is not known.
    """

    judge: str
    prompts: int
    samples_per_prompt: int
    failed_prompts: int
    truncated_share: float | None
    curve: BestOfNCurve
    fit: OverOptimisation | None
    win_rates: tuple[WinRate, ...]
    spread: RewardSpread
    agreement: RankAgreement


def load_samples(path: str, key: str, judged: bool = False) -> PolicySamples:
    """Read samples that somebody else drew: rows with `prompt` (a string or chat messages), `responses` (a list of at
    least two strings) and, in all rows or in none, `judge` (a list of a number for each response).

    Rows with more responses than another are cut to the shortest row, and what is cut is counted.

    Args:
        key: the settings key that holds `path`, for messages.
        judged: all rows need `judge`.

    Raises:
        BadInput: an unreadable source, or the first row that cannot be used. None is skipped: without it the curve is
            another one.
    """
    rows = [_read_row(row) for row in read_rows(path, NoBadRows(key), split=None, limit=None, key=key)]
    for row in rows:
        if (row.judge is None) != (rows[0].judge is None):
            without = row if row.judge is None else rows[0]
            raise BadInput(without.place, "has no `judge`, but another row has", "`judge` in all rows or in none")
    if judged and rows[0].judge is None:
        raise BadInput(rows[0].place, "has no `judge`", "rows with `judge`, or another best_of_n.judge than `samples`")
    count = min(len(row.responses) for row in rows)
    judge = [row.judge[:count] for row in rows if row.judge is not None]
    return PolicySamples(
        prompts=tuple(row.prompt for row in rows),
        responses=tuple(row.responses[:count] for row in rows),
        places=tuple(row.place for row in rows),
        judge=np.array(judge) if judge else None,
        num_surplus=sum(len(row.responses) - count for row in rows),
    )


@dataclass(frozen=True)
class PolicyToSample:
    """A policy and the prompts it is given, read and checked."""

    settings: BestOfNSettings
    model: str
    path: str
    tokenizer: Any
    prompts: PromptSet
    context_tokens: int


def read_policy(settings: BestOfNSettings) -> PolicyToSample:
    """Read what is to be sampled, before anything starts.

    Args:
        settings: with `policy` and `prompts`.

    Raises:
        BadInput: the policy or its prompts cannot be used.
    """
    model = settings.policy
    assert model is not None, "there is a policy where there is no path"
    assert settings.prompts is not None, "there are prompts where there is no path"
    key = "best_of_n.policy"
    facts = read_model_facts(model, key)
    check_language_model(facts, model, key)
    tokenizer = load_policy_tokenizer(model, key)
    check_tokenizer_fits(tokenizer, facts, model, key)
    prompts = load_prompts(
        settings.prompts,
        tokenizer,
        max_prompt_tokens=settings.max_prompt_tokens,
        context_tokens=facts.context_tokens,
        max_response_tokens=settings.max_response_tokens,
        key="best_of_n.prompts.path",
        section="best_of_n",
    )
    context_tokens = min(facts.context_tokens, settings.max_prompt_tokens + settings.max_response_tokens)
    return PolicyToSample(settings, model, settings.prompts.path, tokenizer, prompts, context_tokens)


def sample_policy(policy: PolicyToSample, cluster: ClusterSettings, seed: int, tracker: Tracker) -> PolicySamples:
    """Sample from a policy with vLLM, on the cluster that this process is connected to.

    Every response has a seed of its own, keyed by prompt and sample, and a shard of prompts is made in one engine, so
    the samples are the same whatever the number of replicas.

    Args:
        seed: the run's.
        tracker: of the run.

    Raises:
        RoleFailure: an engine failed.
    """
    settings, prompts, tokenizer = policy.settings, policy.prompts, policy.tokenizer
    eos_token_id = int(tokenizer.eos_token_id)
    rollouts: list[Rollout] = []
    with role_group(RoleRequest("generator", "best_of_n.generator", settings.generator), cluster, tracker) as group:
        group.build_all(
            partial(Generator, policy.model, settings.generator, policy.context_tokens, eos_token_id, WeightSettings())
        )
        pending = [
            group.of(plan.index).ask(Generator.generate, plan, UNTRAINED)
            for plan in plan_samples(prompts, settings, seed)
        ]
        # One call of each engine at a time: the deadline is that of a call.
        for start in range(0, len(pending), len(group)):
            rollouts += group.wait(pending[start : start + len(group)])
    texts = [text for rollout in rollouts for text in _decoded(rollout, tokenizer)]
    count = settings.samples_per_prompt
    return PolicySamples(
        prompts=tuple(Conversation(prompt.text, prompt.messages, prompt.label) for prompt in prompts),
        responses=tuple(tuple(texts[start : start + count]) for start in range(0, len(texts), count)),
        places=tuple(f"{policy.path}: prompt {prompt.index + 1}" for prompt in prompts),
        truncated_share=float(np.mean(np.concatenate([each.finish_reasons for each in rollouts]) == FINISH_LENGTH)),
        num_skipped=prompts.num_skipped,
    )


def plan_samples(prompts: PromptSet, settings: BestOfNSettings, seed: int) -> list[ShardPlan]:
    """Shards that fill an engine each, whatever the number of engines."""
    return cut_into_shards(
        [(prompt.index, prompt.token_ids) for prompt in prompts],
        seed,
        "best-of-n",
        prompts_per_shard=max(1, settings.generator.max_concurrent_sequences // settings.samples_per_prompt),
        samples_per_prompt=settings.samples_per_prompt,
        temperature=settings.temperature,
        max_response_tokens=settings.max_response_tokens,
    )


def score_samples(samples: PolicySamples, encoding: RewardEncoding, score: TextScorer) -> NDArray[np.float64]:
    """`[P, N]` scores of a reward model, NaN where there is none.

    Args:
        encoding, score: of the reward model.

    Raises:
        BadInput: the chat template refuses messages.
    """
    encoded: list[Encoded] = []
    for prompt, responses, place in zip(samples.prompts, samples.responses, samples.places, strict=True):
        try:
            encoded += [encoding.encode_turn(prompt.messages or prompt.text, response) for response in responses]
        except RowError as problem:
            raise BadInput(place, problem.found, problem.allowed) from None
    count = len(samples.prompts)
    prompts = np.repeat(np.arange(count), [len(responses) for responses in samples.responses])
    return score(encoded, prompts).reshape(count, -1)


def judge_samples(samples: PolicySamples, judge: str) -> NDArray[np.float64]:
    """`[P, N]` scores of a second judge that is no reward model.

    Args:
        judge: `samples` for those that came with the samples, `vader` for a lexicon's of the response alone.
    """
    if judge == "samples":
        if samples.judge is None:
            raise ValueError("the samples come without a judge's scores")
        return samples.judge
    if judge == "vader":
        compound = vader_judge()
        return np.array([[compound(response) for response in responses] for responses in samples.responses])
    raise ValueError(f"the judge '{judge}' is a reward model: see `score_samples`")


def report_best_of_n(
    proxy: ArrayLike,
    gold: ArrayLike,
    judge_name: str,
    *,
    truncated_share: float | None = None,
) -> BestOfNReport:
    """Everything that is known of a reward model from several samples a prompt.

    Args:
        proxy: `[P, N]` scores of the reward model, N at least 2; NaN where there is none.
        gold: `[P, N]` scores of the second judge for the same samples, likewise.

    Raises:
        BadInput: no prompt has scores for all its samples.
    """
    rewards, worth = np.asarray(proxy, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    if rewards.shape != worth.shape or rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"scores of shape {rewards.shape} and {worth.shape}, not prompts by at least two samples each")
    good = np.isfinite(rewards).all(axis=1) & np.isfinite(worth).all(axis=1)
    if not good.any():
        raise BadInput(
            "best_of_n",
            f"each of the {len(rewards)} prompts has a sample without a score "
            f"({int((~np.isfinite(rewards)).sum())} of {rewards.size} by the reward model, "
            f"{int((~np.isfinite(worth)).sum())} by the judge)",
            "texts that reward model and judge can score (scorer.max_length, scorer.on_too_long: truncate)",
        )
    rewards, worth = rewards[good], worth[good]
    count = rewards.shape[1]
    sizes = sorted({*(1 << power for power in range(count.bit_length())), count})
    curve = best_of_n_curve(rewards, worth, sizes)
    return BestOfNReport(
        judge=judge_name,
        prompts=len(rewards),
        samples_per_prompt=count,
        failed_prompts=int((~good).sum()),
        truncated_share=truncated_share,
        curve=curve,
        fit=fit_overoptimisation(curve.points),
        win_rates=tuple(WinRate(n, win_rate(rewards, n), expected_win_rate(n)) for n in sizes[:-1]),
        spread=_spread(rewards),
        agreement=_agreement(rewards, worth),
    )


def _spread(rewards: NDArray[np.float64]) -> RewardSpread:
    prompts, count = rewards.shape
    within = rewards.var(axis=1, ddof=1)
    share = None
    if prompts > 1 and np.ptp(rewards) > 0:
        # The variance of the prompts' means holds 1/N of the variance within, which is not between prompts.
        between = max(float(rewards.mean(axis=1).var(ddof=1) - within.mean() / count), 0.0)
        share = between / (between + float(within.mean()))
    flat = np.ptp(rewards, axis=1) <= SCORED_FLAT * rewards.std()
    return RewardSpread(float(np.sqrt(within).mean()), share, float(flat.mean()))


def _agreement(rewards: NDArray[np.float64], worth: NDArray[np.float64]) -> RankAgreement:
    ranks = np.stack([rankdata(scores, axis=1) for scores in (rewards, worth)])
    ranks -= (rewards.shape[1] + 1) / 2
    lengths = np.sqrt((ranks**2).sum(axis=2))
    both = (lengths > 0).all(axis=0)
    if not both.any():
        return RankAgreement(None, None, None, 0)
    correlations = (ranks[0] * ranks[1]).sum(axis=1)[both] / lengths.prod(axis=0)[both]
    found = mean_with_interval(correlations)
    return RankAgreement(float(correlations.mean()), found.low, found.high, len(correlations))


@dataclass(frozen=True)
class _SampleRow:
    prompt: Conversation
    responses: tuple[str, ...]
    judge: tuple[float, ...] | None
    place: str


def _read_row(row: Row) -> _SampleRow:
    try:
        responses = _responses(row.values)
        return _SampleRow(_prompt(row.values), responses, _judge(row.values, len(responses)), row.place)
    except RowError as problem:
        raise BadInput(row.place, problem.found, problem.allowed) from None


def _prompt(values: Mapping[str, Any]) -> Conversation:
    _, value = first_present(values, ("prompt",))
    if not isinstance(value, list):
        return Conversation(text_value(value, "prompt"))
    messages = tuple(parse_messages(value, "prompt"))
    return Conversation("\n".join(message["content"] for message in messages), messages)


def _responses(values: Mapping[str, Any]) -> tuple[str, ...]:
    _, value = first_present(values, ("responses",))
    allowed = "a list of at least two strings"
    if not isinstance(value, list) or not all(isinstance(response, str) for response in value):
        raise RowError("`responses` is not a list of strings", allowed)
    if len(value) < 2:
        raise RowError(f"`responses` has {len(value)} entries", allowed)
    return tuple(value)


def _judge(values: Mapping[str, Any], num_responses: int) -> tuple[float, ...] | None:
    value = values.get("judge")
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != num_responses:
        raise RowError("`judge` does not fit `responses`", f"a list of {num_responses} numbers, one for each response")
    return tuple(number_value(number, f"judge[{index}]") for index, number in enumerate(value))


def _decoded(rollout: Rollout, tokenizer: Any) -> list[str]:
    """The responses as text, in the order of the rollout."""
    starts = rollout.token_starts()
    return [
        tokenizer.decode(rollout.tokens[start + prompt : end], skip_special_tokens=True)
        for start, prompt, end in zip(starts[:-1], rollout.prompt_lengths, starts[1:], strict=True)
    ]
