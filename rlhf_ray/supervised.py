"""Supervised warm-up of a policy on text, with the learner that PPO uses."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial

from rlhf_ray.config.algorithm import AlgorithmSettings
from rlhf_ray.config.settings import SFTConfig
from rlhf_ray.data.text import TextExample, load_text
from rlhf_ray.models.policy import read_policy
from rlhf_ray.randomness import batch_rows
from rlhf_ray.roles.policy_learner import PolicyLearner, TextReport
from rlhf_ray.runtime.actor_group import ActorGroup
from rlhf_ray.runtime.cluster import RoleRequest
from rlhf_ray.runtime.learner_group import connected, ranks, role_group
from rlhf_ray.runtime.run import Run
from rlhf_ray.tracking.display import Column
from rlhf_ray.tracking.report import plot_loss
from rlhf_ray.tracking.tracker import check_folder, take_up_copy

COLUMNS = (
    Column("loss", "loss", ".4f", curve=True, better="lower"),
    Column("grad_norm", "grad", ".2f"),
    Column("throughput/tokens_per_s", "tok/s", ".0f"),
    Column("time/step_s", "s/step", ".1f"),
)


@dataclass
class TextState:
    """How far training is.

    Attributes:
        tokens: learned from, in all steps.
    """

    step: int = 0
    tokens: int = 0


def run_sft(config: SFTConfig, resume: bool = False) -> None:
    """Everything `rlhf-ray sft` does.

    Raises:
        BadInput: before any actor starts.
        RoleFailure: a rank failed, died or did not answer.
        Stopped: by SIGTERM or SIGINT; there is a checkpoint of the last step.
    """
    check_folder(config, resume)
    take_up_copy(config, resume)
    policy, facts = config.policy, read_policy(config.policy)
    text = load_text(config.text, facts.tokenizer, facts.facts.context_tokens)
    steps = config.steps or config.epochs * math.ceil(len(text.examples) / config.batch_size)
    request = RoleRequest("policy", "policy.learner", policy.learner)
    title = f"SFT {config.run.name} · {policy.model}"
    with (
        connected(config.cluster, [[request]]),
        Run(config, "sft", title, steps, COLUMNS, config.checkpoint, resume) as run,
        role_group(request, config.cluster, run.tracker) as group,
    ):
        tracker = run.tracker
        if text.num_skipped or text.num_truncated:
            tracker.events.write("rows_left_out", skipped=text.num_skipped, truncated=text.num_truncated)
            tracker.display.message(f"{text.num_skipped} rows skipped, {text.num_truncated} cut")
        tracker.phase("loading the model")
        algorithm = AlgorithmSettings()
        seed = config.run.seed
        group.build_all(
            *(partial(PolicyLearner, policy, algorithm, rank, total_steps=steps, seed=seed) for rank in ranks(group))
        )
        state = TextState()
        restored = run.restore(TextState)
        if restored is not None:
            state, checkpoint = restored
            group.call_all(PolicyLearner.load_checkpoint, str(checkpoint))
        while state.step < steps:
            started = time.monotonic()
            rows = batch_rows(len(text.examples), config.batch_size, config.run.seed, state.step)
            report = _train(group, [text.examples[row] for row in rows])
            seconds = time.monotonic() - started
            state.step += 1
            state.tokens += report.tokens
            tracker.step(
                {
                    "step": state.step,
                    "epoch": state.step * config.batch_size / len(text.examples),
                    "loss": report.loss,
                    "tokens": state.tokens,
                    "grad_norm": report.grad_norm,
                    "lr": report.learning_rate,
                    "throughput/tokens_per_s": report.tokens / seconds,
                    "time/step_s": seconds,
                }
            )
            if state.step < steps:
                run.keep(state.step, state, partial(group.ask_all, PolicyLearner.save_checkpoint))
        tracker.phase("writing the policy")
        group.call_all(PolicyLearner.export, str(run.folder.policy.absolute()))
        if policy.lora is not None:
            group.call_all(PolicyLearner.export_adapters, str(run.folder.policy_adapters.absolute()))
        plot_loss(run.folder.metrics, run.folder.plot, f"{config.run.name} · {policy.model}")
        loss = tracker.metrics.read()[-1]["loss"]
        tracker.finish({"name": config.run.name, "steps": steps, "loss": loss, "wall_s": tracker.wall_s})


def _train(group: ActorGroup[PolicyLearner], examples: list[TextExample]) -> TextReport:
    asked = [rank.ask(PolicyLearner.train_text, examples[number :: len(group)]) for number, rank in enumerate(group)]
    return group.wait(asked)[0]
