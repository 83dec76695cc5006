"""Weight syncs with one tensor stale, zeroed or permuted, each of which must be caught.

A fault *on the way* happens between the learner's memory and the engine; one *at the source* is sent as if it were
right (a wrong gather, say), so that only the comparison of log-probs can see it. One learner and one engine, in this
process; the learner takes one PPO step between the two versions.
"""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.results import Report, Result
from rlhf_ray.algorithms.experience import ExperienceShard
from rlhf_ray.algorithms.parity import Probed
from rlhf_ray.config.algorithm import AlgorithmSettings
from rlhf_ray.config.settings import GeneratorSettings, LearnerSettings, PolicySettings, WeightSettings
from rlhf_ray.models.buckets import UNTRAINED, Proof, Snapshot, WeightBucket
from rlhf_ray.models.loading import cpu_has_bf16, load_policy_tokenizer
from rlhf_ray.randomness import keyed_generator, keyed_seed
from rlhf_ray.roles.generator import Generator, ShardPlan
from rlhf_ray.roles.policy_learner import PolicyLearner
from rlhf_ray.roles.rank_group import Rank
from rlhf_ray.rollout import RewardColumn
from rlhf_ray.runtime.weight_transfer import probe_rows

FAULTS: dict[str, Callable[[torch.Tensor, torch.Tensor, np.random.Generator], torch.Tensor]] = {
    "stale": lambda new, old, random: old,
    "zeroed": lambda new, old, random: torch.zeros_like(new),
    "permuted": lambda new, old, random: new.flatten()[random.permutation(new.numel())].view(new.shape),
}
PROMPTS = ("I think the movie was", "They say the song is", "You know the cast", "We found the ending seems")


class Pair:
    """A learner and an engine with the same model, and the learner's weights before and after one step."""

    def __init__(self, model: str, dtype: str, learning_rate: float, rank: Rank) -> None:
        tokenizer = load_policy_tokenizer(model, "model")
        prompts = [np.array(tokenizer(text).input_ids, dtype=np.int32) for text in PROMPTS]
        self.probe = probe_rows(prompts, WeightSettings().probe_tokens, 128)
        engine = GeneratorSettings.model_validate({"dtype": dtype, "kv_cache_gib": 0.1, "max_concurrent_sequences": 16})
        self.generator = Generator(model, engine, 128, tokenizer.eos_token_id, WeightSettings())
        learner = LearnerSettings.model_validate({"dtype": dtype, "learning_rate": learning_rate, "zero_stage": 1})
        algorithm = AlgorithmSettings.model_validate({"advantage": "rloo", "kl": {"coefficient": 0}})
        self.learner = PolicyLearner(
            PolicySettings(model=model, learner=learner), algorithm, rank, total_steps=10, temperature=1.0, seed=0
        )
        self._layout = self.learner.weight_layout(64 << 20)
        self.names = [name for bucket in self._layout for name in bucket]
        self.old = self._weights()
        first = self.sync(Snapshot(0, frozenset(self.names), [WeightBucket.of(self.old.items())]), None)
        assert not first
        self.before = self.generator._probed
        self._train(prompts)
        self.new = self._weights()

    def _weights(self) -> dict[str, torch.Tensor]:
        buckets = [self.learner.weight_bucket(index) for index in range(len(self._layout))]
        return {name: tensor.clone() for bucket in buckets if bucket for name, tensor in bucket.tensors()}

    def _train(self, prompts: Sequence[np.ndarray]) -> None:
        seeds = tuple(keyed_seed(0, "fault", prompt, sample) for prompt in range(len(prompts)) for sample in range(4))
        plan = ShardPlan(0, tuple(range(len(prompts))), tuple(prompts), 4, seeds, 1.0, 24)
        rollout = self.generator.generate(plan, UNTRAINED)
        scores = keyed_generator(0, "scores").normal(size=rollout.num_samples)
        rewards = RewardColumn(scores, ("",) * rollout.num_samples, "random")
        shard = ExperienceShard(rollout, rewards, policy=self.learner.logprobs(rollout))
        self.learner.train(0, [shard], 0.0)

    def sync(self, snapshot: Snapshot, before: Probed | None) -> str:
        """One attempt; gives what the generator finds wrong, or nothing."""
        proven = replace(snapshot, proof=Proof(self.probe, self.learner.probe(self.probe)))
        return self.generator._load(proven) or self.generator._prove(proven, before)

    def caught(self, name: str, fault: str, on_the_way: bool, random: np.random.Generator) -> bool | None:
        """Whether a sync with this fault of this tensor is noticed; None where the tensor is the same with it."""
        wrong = FAULTS[fault](self.new[name], self.old[name], random)
        if torch.equal(wrong, self.new[name]):
            return None
        sent = WeightBucket.of({**self.new, name: wrong}.items())
        if on_the_way:
            sent = replace(sent, digests=WeightBucket.of(self.new.items()).digests)
        return bool(self.sync(Snapshot(1, frozenset(self.names), [sent]), self.before))


def measure(label: str, pair: Pair, count: int) -> list[Result]:
    """Shares of the faults that are caught; and that a sound sync, before and after all of them, is let through."""
    results = []
    for place in ("on the way", "at the source"):
        for fault in FAULTS:
            random = keyed_generator(0, "fault", place == "on the way", sorted(FAULTS).index(fault))
            tried: list[bool] = []
            # A tensor that the step left bit-for-bit unchanged cannot be stale, so another one is drawn.
            for name in random.choice(pair.names, size=20 * count):
                caught = pair.caught(str(name), fault, place == "on the way", random)
                if caught is not None:
                    tried.append(caught)
                if len(tried) == count:
                    break
            target = ">= 1" if place == "on the way" else None
            share = sum(tried) / len(tried)
            results.append(Result(f"{label}: one tensor {fault} {place}, caught", share, target=target))
            results.append(Result(f"{label}: one tensor {fault} {place}, tried", len(tried), target=f">= {count}"))
    fault = pair.sync(Snapshot(1, frozenset(pair.names), [WeightBucket.of(pair.new.items())]), pair.before)
    assert pair.generator._probed is not None
    sound = pair.generator._probed.parity
    results.append(Result(f"{label}: a sound sync let through", float(not fault), target=">= 1"))
    results.append(Result(f"{label}: median change of a log-prob in the step", sound.change, "nats"))
    results.append(Result(f"{label}: median residual of a sound sync", sound.residual, "nats"))
    return results


def _measure(label: str, model: str, dtype: str, learning_rate: float, count: int) -> list[Result]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    return measure(label, Pair(model, dtype, learning_rate, Rank(0, 1, "127.0.0.1", port)), count)


def main() -> None:
    """Tiny (tied) and, where it is prepared, SmolLM2-135M, in float32 and in bfloat16 where the CPU has it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--count", type=int, default=100, help="faults of each kind")
    parser.add_argument("--models", default="tiny,smollm2-135m")
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    models: dict[str, Any] = {
        "tiny": (arguments.data / "tiny" / "policy_tied", 1e-3),
        "smollm2-135m": (arguments.data / "smollm2-135m", 1e-5),
    }
    report = Report("sync_faults")
    # Each in a process of its own: neither engine can be started twice in one.
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        for name in arguments.models.split(","):
            model, learning_rate = models[name]
            for dtype in ("float32", "bfloat16") if cpu_has_bf16() else ("float32",):
                label = f"{name} {dtype}"
                work = processes.submit(_measure, label, str(model), dtype, learning_rate, arguments.count)
                report.add(work.result(), label)


if __name__ == "__main__":
    main()
