"""Every metric that a run logs, with its unit and its meaning.

A metric is not finished before it has a sentence that helps somebody who looks at a bad run at night: what it
is, what a bad value means, and what to do first. `docs/metrics.md` is generated from here, and a run refuses
to log a name that is not here.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

MetricKind = Literal["ppo", "sft", "reward_model"]


class Metric(NamedTuple):
    """One logged number.

    Attributes:
        name: key in `metrics.jsonl`.
        unit: unit of the number; empty for a plain ratio or score.
        meaning: what it is and what a bad value means.
    """

    name: str
    unit: str
    meaning: str


_STEP_TIME = Metric(
    "time/step_s",
    "s",
    "Wall time from the end of the step before to the end of this one, everything included. What the phases below do "
    "not add up to is the driver's own work: checkpoints, logging, waiting for the slowest replica.",
)
_WALL = Metric(
    "wall_s",
    "s",
    "Wall time since this process took up the run, loading the models included; a resume starts again at 0.",
)

PPO_METRICS: tuple[Metric, ...] = (
    Metric(
        "step",
        "",
        "Number of the step, from 1. One step samples, scores, trains and sends weights once.",
    ),
    Metric(
        "samples",
        "samples",
        "Responses sampled since the run began, all steps together.",
    ),
    Metric(
        "tokens",
        "tokens",
        "Response tokens sampled since the run began, all steps together.",
    ),
    _WALL,
    Metric(
        "reward/mean",
        "score",
        "Mean reward over the step's responses, before any clipping, penalty or KL: the score, or the weighted sum of "
        "several sources' scores. The one number that should rise; if it rises while samples get worse to read, the "
        "policy is exploiting the reward: raise `algorithm.kl.coefficient` or stop earlier.",
    ),
    Metric(
        "reward/std",
        "score",
        "Standard deviation of those rewards. Close to 0 means that all responses look the same to whatever scores them"
        " and there is nothing to learn from: look at `policy/entropy` and the samples.",
    ),
    Metric(
        "reward/shaped_mean",
        "score",
        "Mean over responses of the total reward PPO maximises: score after whitening, clipping and penalties, "
        "minus the KL penalty when it is placed in the reward. If it falls while `reward/mean` rises, the KL "
        "penalty is eating the gain.",
    ),
    Metric(
        "reward/failures",
        "samples",
        "Responses of this step without a reward, because a source could not score them; they are left out of training "
        "and each "
        "cause is in `events.jsonl`. Anything but 0 deserves a look at the causes.",
    ),
    Metric(
        "reward/disagreement",
        "score",
        "Mean standard deviation of the score over the members of a reward-model ensemble. Rising during training: the "
        "policy moves to where the reward model only guesses; use `aggregation.members: minimum` in its training, or "
        "raise `algorithm.kl.coefficient`. Of several ensembles, the sum, each times its weight. Absent without one.",
    ),
    Metric(
        "reward/<source>/mean",
        "score",
        "Mean score of one source, by its `name`, over the responses that it could score, before its weight. Shows "
        "which source the reward comes from; where one rises and another falls, look at their weights.",
    ),
    Metric(
        "reward/<source>/std",
        "score",
        "Standard deviation of that source's scores. Times its weight, it is how much the source has to say: one that "
        "is far below the others' is hardly learned from.",
    ),
    Metric(
        "reward/<source>/failed_fraction",
        "",
        "Share of the responses that the source could not score. The causes are in `events.jsonl` under "
        "`scores_failed`; of a function, the tracebacks are in the log of its role.",
    ),
    Metric(
        "reward/<source>/time_s",
        "s",
        "Mean time that the source took to score a shard. Above the time that a shard takes to sample, the source "
        "holds up the step: give it more `replicas`, or a function a larger `batch_size`.",
    ),
    Metric(
        "reward/truncated",
        "samples",
        "Texts cut because they were longer than `reward.max_length`. Their scores judge only a part: raise the "
        "limit or shorten `sampling.max_response_tokens`.",
    ),
    Metric(
        "kl/reference",
        "nats per sequence",
        "How far the policy has moved from the reference: mean over responses of the summed per-token log-ratio "
        "(k1). Grows slowly in a healthy run; a jump, or tens of nats, means drift: raise "
        "`algorithm.kl.coefficient`, lower the learning rate, or set `algorithm.kl.stop_above`.",
    ),
    Metric(
        "kl/reference_per_token",
        "nats per token",
        "The same divided by the number of response tokens, so that runs with other response lengths can be compared.",
    ),
    Metric(
        "kl/coefficient",
        "",
        "β, the weight of the KL penalty in this step. Moves only with the adaptive controller.",
    ),
    Metric(
        "policy/loss",
        "",
        "Surrogate loss, mean over the step's updates. Near 0 by construction and no measure of progress: "
        "look at `reward/mean`.",
    ),
    Metric(
        "policy/entropy",
        "nats per token",
        "Mean entropy of the policy's next-token distribution, over tokens as they weigh in the loss. A quick fall "
        "towards 0 is collapse to a few phrases: raise the KL coefficient or the entropy bonus, lower the learning "
        "rate.",
    ),
    Metric(
        "policy/clip_fraction",
        "",
        "Share of tokens whose ratio was clipped (with `gspo`, whose response's was), as they weigh in the loss: where "
        "`loss_aggregation` is `sequence`, the mean over responses. 0 with one update a step; above about 0.3 the "
        "updates are too large: fewer `epochs`, lower learning rate.",
    ),
    Metric(
        "policy/approx_kl",
        "nats per token",
        "Distance of the updated policy from the one below it in the ratio (`algorithm.old_logprobs`), within this "
        "step. 0 in the first minibatch; above about 0.05 the updates are too large: lower the learning rate.",
    ),
    Metric(
        "policy/ratio_max",
        "",
        "Largest factor between a token's new and old probability, whichever is the larger one. Exactly 1 in the first "
        "minibatch; hundreds mean a broken log-prob somewhere or far too large a step.",
    ),
    Metric(
        "policy/importance_weight_mean",
        "",
        "Mean of the importance weights as they are used, truncated and masked. Near 1 when engine and learner agree; "
        "see `mismatch/*` when it is not. 1 when the correction is off.",
    ),
    Metric(
        "importance/effective_sample_fraction",
        "",
        "Effective sample size of the importance weights before truncation and mask, (Σ w)² / (n Σ w²): the share of "
        "the step's tokens (or responses, with `importance.level: sequence`) that they are worth to the policy that "
        "learns from them. 1 when engine and learner agree; below 0.5 there is an event `samples_off_policy`: lower "
        "the staleness, or look at `mismatch/*`. Empty when the correction is off.",
    ),
    Metric(
        "importance/truncated_fraction",
        "",
        "Share of tokens or responses whose importance weight was above `importance.truncate`. More than a few "
        "percent: the samples are too old, or the engine computes something else than the learner.",
    ),
    Metric(
        "importance/masked_fraction",
        "",
        "Share of tokens or responses left out of the policy loss, because their importance weight was outside "
        "`importance.mask`. 0 without a mask.",
    ),
    Metric(
        "policy/grad_norm",
        "",
        "Norm of the policy's gradient before clipping, mean over the updates. Lasting values far above "
        "`max_grad_norm` mean that clipping sets the step size: lower the learning rate.",
    ),
    Metric(
        "policy/lr",
        "",
        "Learning rate of the policy's last update in this step.",
    ),
    Metric(
        "advantage/mean",
        "",
        "Mean advantage over response tokens, before whitening. Far from 0 with a critic means that it lags behind"
        " the rewards: raise its learning rate.",
    ),
    Metric(
        "advantage/std",
        "",
        "Standard deviation of the advantages, before whitening. Near 0: no signal, as with `reward/std`.",
    ),
    Metric(
        "return/mean",
        "score",
        "Mean return over response tokens: what the critic learns to predict.",
    ),
    Metric(
        "value/loss",
        "",
        "Half the squared error of the critic (clipped with `algorithm.value_clip`), mean over the updates. Should "
        "fall during the first tens of steps; a critic that never learns shows in `value/explained_variance`.",
    ),
    Metric(
        "value/explained_variance",
        "",
        "1 - Var(return - value) / Var(return), with the values from before the update. 1 is perfect, 0 no better "
        "than a constant, below 0 worse than none: raise the critic's learning rate or use `rloo`.",
    ),
    Metric(
        "value/clip_fraction",
        "",
        "Share of tokens whose value was to move further towards its return than `algorithm.value_clip` lets it. "
        "Lastingly high: the clip holds the critic back, widen it or scale the rewards down.",
    ),
    Metric(
        "critic/grad_norm",
        "",
        "Norm of the critic's gradient before clipping, mean over the updates. Large in the first steps; if it "
        "stays far above `max_grad_norm`, scale or whiten the rewards.",
    ),
    Metric(
        "critic/lr",
        "",
        "Learning rate of the critic's last update in this step.",
    ),
    Metric(
        "group/uniform_fraction",
        "",
        "Share of prompts whose responses all have exactly the same score, of those with at least two scores. They "
        "teach group-based algorithms nothing: near 1 the prompts are too easy or too hard. Empty with one sample a "
        "prompt.",
    ),
    Metric(
        "group/unfilled",
        "prompts",
        "Prompts that fill the step because there were no others, although their responses all score alike or have no "
        "scores; only with `sampling.spare_prompts`, which should be raised where this is not 0.",
    ),
    Metric(
        "group/surplus",
        "prompts",
        "Prompts that were sampled and would have taught something, but were not needed to fill the step; only with "
        "`sampling.spare_prompts`, which can be lowered where this stays high.",
    ),
    Metric(
        "response/length_mean",
        "tokens",
        "Mean response length, counted in tokens that the policy sampled. A steady climb to the limit often means that "
        "the reward model likes long answers; a fall to a few tokens that it likes none.",
    ),
    Metric(
        "response/truncated_fraction",
        "",
        "Share of responses cut at `sampling.max_response_tokens`. High where complete answers are wanted: raise "
        "the limit or set `algorithm.missing_eos_penalty`.",
    ),
    Metric(
        "response/eos_fraction",
        "",
        "Share of responses that ended before the limit; 1 minus the share that was cut.",
    ),
    Metric(
        "response/masked",
        "samples",
        "Responses left out of the policy loss because they were cut off (`algorithm.mask_truncated`). Where it is "
        "most of the step, raise `sampling.max_response_tokens`.",
    ),
    Metric(
        "response/not_sampled",
        "tokens",
        "Response tokens that the policy did not sample, but a tool or another speaker wrote: they weigh 0 everywhere. "
        "0 without environments.",
    ),
    Metric(
        "mismatch/kl",
        "nats per token",
        "How far the engine's log-probs of the sampled tokens are from the learner's: estimated KL(engine ‖ learner). "
        "With the same weights (`staleness/max` 0) it should stay below about 1e-3; growth means wrong weights, or "
        "another temperature, template or kernel. Where sampling runs ahead, the steps in between count too.",
    ),
    Metric(
        "mismatch/max_abs_dlogp",
        "nats",
        "Largest |Δ log-prob| between engine and learner over the sampled tokens. With the same weights about 1e-5 in "
        "float32; in bfloat16 tenths are usual, whole nats are not.",
    ),
    Metric(
        "mismatch/mean_ratio",
        "",
        "Mean exp|Δ log-prob| between engine and learner over the sampled tokens. 1 is perfect; above 1.05 training is "
        "no longer on-policy. With `staleness/max` 0, check dtypes and the attention kernel; else it is the staleness, "
        "which `algorithm.importance` corrects.",
    ),
    Metric(
        "sync/max_abs_dlogp",
        "nats",
        "Largest |Δ log-prob| between engine and learner on the probe's tokens, right after the new weights reached "
        "the engine; the worst engine. Where both compute in float32 on CPUs, the weights are sent again when it "
        "exceeds `weights.max_abs_dlogp_float32`, and the run ends when that did not help.",
    ),
    Metric(
        "sync/change",
        "nats",
        "Median |change| of the learner's log-probs on the probe's tokens since the weights before: how far one step "
        "moved the policy. 0 at the first sync.",
    ),
    Metric(
        "sync/residual",
        "nats",
        "Median |engine's change − learner's change| on the probe's tokens. Rounding, far below `sync/change` in "
        "float32; when it grows, the engine does not get the weights that the learner has, and the run ends.",
    ),
    Metric(
        "weights/version",
        "",
        "Version of the policy's weights after this step; rises by one with each sync.",
    ),
    Metric(
        "staleness/mean",
        "versions",
        "Mean over response tokens of how many versions behind the learner the sampling weights were. 0 in the "
        "synchronous loop; min(step - 1, `algorithm.max_staleness`) where sampling runs ahead; between the two with "
        "in-flight updates.",
    ),
    Metric(
        "staleness/max",
        "versions",
        "The most stale token of the step; never above `algorithm.max_staleness`.",
    ),
    Metric(
        "held_out/reward",
        "",
        "Mean reward of held-out prompts with the weights of this step, every `evaluation.every_steps`. Where it falls "
        "while `reward/mean` rises, the policy learns the training prompts by heart.",
    ),
    Metric(
        "held_out/judge",
        "",
        "Mean of `evaluation.judge` on the same responses. Where it falls while the reward rises, the reward model is "
        "being exploited: stop there, and look at the samples.",
    ),
    Metric("held_out/kl", "nats", "Distance of the same responses from the reference, as `kl/reference`."),
    Metric("held_out/length", "tokens", "Mean length of the same responses."),
    Metric("held_out/failures", "samples", "Responses among them that have no score; they are in none of the means."),
    Metric("time/held_out_s", "s", "Time of this judgement, and of writing the policy where it is the best so far."),
    _STEP_TIME,
    Metric(
        "time/generate_s",
        "s",
        "Time spent waiting for samples from the generators. Usually the largest part: more generators, fewer "
        "response tokens, or a larger `generator.max_concurrent_sequences`.",
    ),
    Metric(
        "time/reward_s",
        "s",
        "Further wait for the reward model's scores. Roles that score at the same time are counted only as far as "
        "the step had to wait for each.",
    ),
    Metric(
        "time/reference_s",
        "s",
        "Further wait for the reference's log-probs.",
    ),
    Metric(
        "time/values_s",
        "s",
        "Further wait for the critic's values.",
    ),
    Metric(
        "time/old_logprobs_s",
        "s",
        "Time for the learner to compute its log-probs before the first update. `algorithm.old_logprobs: engine` "
        "saves it.",
    ),
    Metric(
        "time/train_s",
        "s",
        "Time for all updates of policy and critic. Train fewer layers, or more ranks.",
    ),
    Metric(
        "time/sync_s",
        "s",
        "Time to bring the new weights into every generator and to check them, as far as it goes beyond the training.",
    ),
    Metric(
        "utilization/busy",
        "",
        "Core-seconds that the roles' processes used since the step before, over the cluster's cores times that time. "
        "Low where processes wait for each other: look at `trace.json`. On GPUs it says how busy the host is.",
    ),
    Metric(
        "recovery/lost",
        "",
        "How often a process has been lost since the run's first start. `events.jsonl` has what became of each, and "
        "`rlhf-ray report` tells it.",
    ),
    Metric(
        "recovery/rolled_back",
        "",
        "How often the run has gone back to its newest checkpoint since its first start, because a rank was lost. "
        "Often: look at why, and lower `checkpoint.every_steps` meanwhile.",
    ),
    Metric(
        "throughput/samples_per_s",
        "samples/s",
        "Responses of this step divided by `time/step_s`.",
    ),
    Metric(
        "throughput/tokens_per_s",
        "tokens/s",
        "Response tokens of this step divided by `time/step_s`.",
    ),
)

_GRAD_NORM = Metric(
    "grad_norm",
    "",
    "Norm of the gradient before clipping. Spikes point at odd rows; lasting values far above `max_grad_norm` at "
    "too high a learning rate.",
)
_LR = Metric(
    "lr",
    "",
    "Learning rate of this update, after warm-up and schedule.",
)
_EPOCH = Metric(
    "epoch",
    "",
    "Passes over the data completed so far, as a fraction.",
)

SFT_METRICS: tuple[Metric, ...] = (
    Metric(
        "step",
        "",
        "Number of the optimizer step, from 1.",
    ),
    _EPOCH,
    _WALL,
    Metric(
        "loss",
        "nats per token",
        "Mean negative log-likelihood of the learned tokens. exp of it is the perplexity. If it does not fall "
        "within tens of steps, raise the learning rate; if it jumps up, lower it.",
    ),
    Metric(
        "tokens",
        "tokens",
        "Tokens trained on since the run began (those that the loss counts).",
    ),
    _GRAD_NORM,
    _LR,
    _STEP_TIME._replace(meaning="Wall time of the step, from fetching the rows to the finished update."),
    Metric(
        "throughput/tokens_per_s",
        "tokens/s",
        "Trained tokens of this step divided by `time/step_s`.",
    ),
)

REWARD_MODEL_METRICS: tuple[Metric, ...] = (
    Metric(
        "step",
        "",
        "Number of the optimizer step, from 1; in an ensemble of independent models over all of them.",
    ),
    Metric(
        "member",
        "",
        "Independent model of the ensemble that the step belongs to, from 0.",
    ),
    _EPOCH,
    _WALL,
    Metric(
        "loss",
        "nats per pair",
        "Bradley-Terry loss, -log sigmoid(score of chosen - score of rejected), with weights and soft labels. 0.693 "
        "is guessing; stuck there means that the model cannot tell the answers apart or the labels are noise.",
    ),
    Metric(
        "accuracy",
        "",
        "Share of the step's pairs whose chosen answer scores higher. 0.5 is guessing. Near 1 on training pairs "
        "with a poor held-out figure is overfitting: fewer epochs.",
    ),
    Metric(
        "margin/mean",
        "score",
        "Mean score of chosen minus rejected. Grows without limit when the model is overconfident: fewer epochs, "
        "or `training.label_smoothing`.",
    ),
    Metric(
        "score/mean",
        "score",
        "Mean score over both answers. `training.centering` keeps it near 0; drift is harmless to PPO but makes "
        "scores hard to compare between models.",
    ),
    Metric(
        "score/std",
        "score",
        "Standard deviation of the scores over both answers. Near 0: the model has not begun to separate anything.",
    ),
    _GRAD_NORM,
    _LR,
    _STEP_TIME._replace(meaning="Wall time of the step, from fetching the pairs to the finished update."),
    Metric(
        "throughput/pairs_per_s",
        "pairs/s",
        "Pairs of this step divided by `time/step_s`.",
    ),
    Metric(
        "tokens/real",
        "tokens",
        "Tokens of the step's texts.",
    ),
    Metric(
        "tokens/computed",
        "tokens",
        "Tokens that went through the model, padding included. Far above `tokens/real`: texts of very different length "
        "share a micro-batch; raise `learner.micro_batch_tokens`.",
    ),
    Metric(
        "validation/accuracy",
        "",
        "Accuracy on the `validation` pairs, every `training.evaluate_every` steps; the best model is kept. Falling "
        "while `accuracy` rises is overfitting.",
    ),
    Metric(
        "validation/loss",
        "nats per pair",
        "Mean negative log-likelihood of the validation pairs. Rising while `validation/accuracy` still grows is "
        "overconfidence, which the stored temperature mends.",
    ),
)

METRICS: dict[MetricKind, tuple[Metric, ...]] = {
    "ppo": PPO_METRICS,
    "sft": SFT_METRICS,
    "reward_model": REWARD_MODEL_METRICS,
}


PHASE_COLORS: dict[str, str] = {
    "generate": "#4e79a7",
    "reward": "#f28e2b",
    "reference": "#edc948",
    "values": "#76b7b2",
    "old logprobs": "#b07aa1",
    "train": "#e15759",
    "sync": "#59a14f",
    "held out": "#9c755f",
    "other": "#8a8a8a",
}
"""Phases of a step in the order in which they happen, each with its colour on the screen and in plots."""


def check_known(kind: MetricKind, names: Iterable[str]) -> None:
    """Refuse names that have no sentence of meaning here. A part in angle brackets stands for a name from the
    configuration: `reward/<source>/mean`.

    Raises:
        ValueError: naming the first unknown metric and the nearest known one.
    """
    known = [metric.name for metric in METRICS[kind]]
    patterns = [re.sub("<[a-z]+>", "[^/]+", metric_name) for metric_name in known]
    for name in names:
        if not any(re.fullmatch(pattern, name) for pattern in patterns):
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{nearest[0]}'?" if nearest else "describe it in rlhf_ray/tracking/metrics.py"
            raise ValueError(f"unknown metric '{name}' of a {kind} run; {hint}")


def phase_times(row: Mapping[str, float | None]) -> dict[str, float]:
    """Where the time of one step went.

    Args:
        row: metrics of one step.

    Returns:
        Seconds by phase (`generate`, `train`, …) in the order of the registry, and under `other` what is left
        of `time/step_s`. Empty when the row has no phases.
    """
    timed = {phase: _seconds(row.get(f"time/{phase.replace(' ', '_')}_s")) for phase in PHASE_COLORS}
    phases = {phase: seconds for phase, seconds in timed.items() if seconds > 0}
    left = _seconds(row.get("time/step_s")) - sum(phases.values())
    if phases and left > 0:
        phases["other"] = left
    return phases


def _seconds(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0
