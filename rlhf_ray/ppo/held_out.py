"""The policy on held-out prompts: before training, every few steps, and after; and the best of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rlhf_ray.config.settings import PPOConfig
from rlhf_ray.models.buckets import UNTRAINED, Snapshot
from rlhf_ray.ppo.evaluation import before_file, held_out_metrics, load_samples, save_samples
from rlhf_ray.ppo.inputs import Inputs
from rlhf_ray.ppo.roles import Roles
from rlhf_ray.ppo.step import generate, plan_shards, refer, score
from rlhf_ray.reward.core.evaluator import EvaluatedSample, Evaluator
from rlhf_ray.roles.policy_learner import PolicyLearner
from rlhf_ray.runtime.answers import Deferred
from rlhf_ray.runtime.run import Run
from rlhf_ray.tracking.run_folder import BEST, write_atomic


@dataclass(frozen=True)
class Best:
    """What is in `policy_best/`, written beside the weights: a checkpoint of before would not know of them.

    Attributes:
        metric: `evaluation.keep_best`.
        value: its mean over the held-out prompts.
    """

    step: int
    metric: str
    value: float


class HeldOut:
    """Judges one run's policy."""

    def __init__(self, config: PPOConfig, inputs: Inputs, roles: Roles, run: Run) -> None:
        self._config, self._inputs, self._roles, self._run = config, inputs, roles, run
        self._judged: tuple[int, list[EvaluatedSample]] | None = None
        self._record = run.folder.policy_best / BEST

    def judge_before(self) -> None:
        """The weights that the engines started with, unless the run has judged them already."""
        if self._inputs.held_out is None:
            return
        path = self._run.folder.path / before_file(self._config, self._inputs)
        if not path.exists():
            self._run.tracker.phase("judging the policy before training")
            save_samples(path, self._evaluate(UNTRAINED, with_kl=False))

    def before(self) -> list[EvaluatedSample]:
        """What `judge_before` found."""
        return load_samples(self._run.folder.path / before_file(self._config, self._inputs))

    def is_due(self, step: int) -> bool:
        """Whether `evaluation.every_steps` steps have been done once more."""
        every = self._config.evaluation.every_steps
        return self._inputs.held_out is not None and every is not None and step % every == 0

    def judge_during(self, step: int, snapshot: Deferred[Snapshot]) -> dict[str, float | int | None]:
        """In the middle of a run; gives metrics of the step.

        Args:
            step: steps done.
            snapshot: the weights after them.
        """
        return held_out_metrics(self._judge(step, snapshot, "judging the policy"))

    def judge_after(self, step: int, snapshot: Deferred[Snapshot]) -> list[EvaluatedSample]:
        """The weights at the end of the run. Arguments as for `judge_during`."""
        if self._judged is not None and self._judged[0] == step:
            return self._judged[1]
        return self._judge(step, snapshot, "judging the policy after training")

    def best(self) -> Best | None:
        """What is in `policy_best/`; None where there is nothing, or it is the best by another metric."""
        try:
            found = Best(**json.loads(self._record.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        return found if found.metric == self._config.evaluation.keep_best else None

    def forget_best(self) -> None:
        """At the first step of a run: what is there is another's."""
        self._record.unlink(missing_ok=True)

    def _judge(self, step: int, snapshot: Deferred[Snapshot], phase: str) -> list[EvaluatedSample]:
        self._run.tracker.phase(phase)
        samples = self._evaluate(snapshot, with_kl=self._roles.has_reference)
        self._judged = step, samples
        self._keep_best(step, samples)
        return samples

    def _keep_best(self, step: int, samples: Sequence[EvaluatedSample]) -> None:
        metric, best = self._config.evaluation.keep_best, self.best()
        found = held_out_metrics(samples).get(f"held_out/{metric}")
        if metric is None or found is None or (best is not None and found <= best.value):
            return
        self._run.tracker.phase("writing the best policy so far")
        self.forget_best()  # until the weights are whole
        folder = self._run.folder.policy_best
        self._roles.policy.call_all(PolicyLearner.export, str(folder.absolute()))
        write_atomic(self._record, json.dumps(asdict(Best(step, metric, found))) + "\n")
        self._run.tracker.events.write("best_policy", step=step, metric=metric, value=found)

    def _evaluate(self, snapshot: Snapshot | Deferred[Snapshot], with_kl: bool) -> list[EvaluatedSample]:
        """Sample, score and judge every held-out prompt.

        Args:
            snapshot: the weights to sample with.
            with_kl: ask the reference too, for the distance from it.

        Returns:
            One entry a sample, in the order of the prompts.
        """
        config, roles, held_out = self._config, self._roles, self._inputs.held_out
        assert held_out is not None, "called with held-out prompts only"
        assert roles.evaluator is not None, "there is one wherever there are held-out prompts"
        [evaluator] = roles.evaluator
        drawn = [(prompt.index, prompt) for prompt in held_out]
        count = config.evaluation.samples_per_prompt
        plans = plan_shards(drawn, config.sampling, config.run.seed, "held-out", samples_per_prompt=count)
        shards = generate(roles, plans, drawn, snapshot)
        scored = score(roles, shards)
        references = refer(roles, shards) if with_kl else None
        columns = [None] * len(shards) if references is None else [each.data for each in references]
        read = [
            evaluator.ask(Evaluator.read, shard.rollout.data, rewards.data, shard.prompts, column)
            for shard, rewards, column in zip(shards, scored, columns, strict=True)
        ]
        return [sample for samples in roles.evaluator.wait(read) for sample in samples]
