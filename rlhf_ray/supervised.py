"""Supervised warm-up of a policy on text, with the learner that PPO uses."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial

from rlhf_ray.config.settings import AlgorithmSettings, SFTConfig
from rlhf_ray.data.text import TextSet, load_text
from rlhf_ray.models.loading import check_tokenizer_fits, check_top_layers, load_policy_tokenizer, read_model_facts
from rlhf_ray.randomness import batch_rows
from rlhf_ray.roles.policy_learner import PolicyLearner, TextReport
from rlhf_ray.runtime.actor_group import ActorGroup
from rlhf_ray.runtime.cluster import RoleRequest
from rlhf_ray.runtime.learner_group import build_learners, connected, role_group
from rlhf_ray.tracking.display import Column
from rlhf_ray.tracking.report import plot_loss
from rlhf_ray.tracking.tracker import Tracker, check_folder, open_folder

COLUMNS = (
    Column("loss", "loss", ".4f", curve=True, better="lower"),
    Column("grad_norm", "grad", ".2f"),
    Column("throughput/tokens_per_s", "tok/s", ".0f"),
    Column("time/step_s", "s/step", ".1f"),
)


def run_sft(config: SFTConfig) -> None:
    """Everything `rlhf-ray sft` does.

    Raises:
        BadInput: before any actor starts.
        RoleFailure: a rank failed, died or did not answer.
    """
    check_folder(config)
    policy = config.policy
    facts = read_model_facts(policy.model, "policy.model")
    tokenizer = load_policy_tokenizer(policy.model, "policy.model")
    check_tokenizer_fits(tokenizer, facts, policy.model, "policy.model")
    check_top_layers(policy.learner.trainable_top_layers, facts, "policy.learner.trainable_top_layers")
    text = load_text(config.text, tokenizer)
    steps = config.steps or config.epochs * math.ceil(len(text.examples) / config.batch_size)
    request = RoleRequest("policy", "policy.learner", policy.learner)
    with connected(config.cluster, [[request]]):
        folder = open_folder(config)
        title = f"SFT {config.run.name} · {policy.model}"
        with (
            Tracker(config, "sft", folder, title, steps, COLUMNS) as tracker,
            role_group(request, config.cluster, folder.logs) as group,
        ):
            if text.num_skipped or text.num_truncated:
                tracker.events.write("rows_left_out", skipped=text.num_skipped, truncated=text.num_truncated)
                tracker.display.message(f"{text.num_skipped} rows skipped, {text.num_truncated} cut")
            tracker.phase("loading the model")
            build = partial(PolicyLearner, total_steps=steps)
            build_learners(group, build, lambda rank: (policy, AlgorithmSettings(), rank))
            for step in range(1, steps + 1):
                started = time.monotonic()
                rows = batch_rows(len(text.examples), config.batch_size, config.run.seed, step - 1)
                report = _train(group, text, rows)
                seconds = time.monotonic() - started
                tracker.step(
                    {
                        "step": step,
                        "epoch": step * config.batch_size / len(text.examples),
                        "wall_s": tracker.wall_s,
                        "loss": report.loss,
                        "tokens": report.tokens,
                        "grad_norm": report.grad_norm,
                        "lr": report.learning_rate,
                        "throughput/tokens_per_s": report.tokens / seconds,
                        "time/step_s": seconds,
                    }
                )
            tracker.phase("writing the policy")
            group.call_all("export", str(folder.policy.absolute()))
            plot_loss(folder.metrics, folder.plot, f"{config.run.name} · {policy.model}")
            tracker.finish({"name": config.run.name, "steps": steps, "loss": report.loss, "wall_s": tracker.wall_s})


def _train(group: ActorGroup, text: TextSet, rows: Sequence[int]) -> TextReport:
    pending = []
    for rank in range(len(group)):
        own = [text.examples[row] for row in rows[rank :: len(group)]]
        pending += group.submit(rank, "train_text", own)
    return group.wait(pending)[0]
