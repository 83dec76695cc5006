"""Sampling responses with vLLM, and loading new weights between shards."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.algorithms.parity import Probed, compare
from rlhf_ray.config.settings import GeneratorSettings, WeightSettings
from rlhf_ray.failures import FailureKind, RoleFailure
from rlhf_ray.models.buckets import UNTRAINED, Snapshot, WeightsDamaged
from rlhf_ray.models.loading import resolve_dtype
from rlhf_ray.randomness import keyed_seed
from rlhf_ray.rollout import FINISH_LENGTH, FINISH_STOP, Rollout
from rlhf_ray.waiting import waiting

_NO_VERSION = -1
_ATTEMPTS = 2
"""A sync that fails is looked at once more before the run is ended."""
_ARRIVAL_S = 3600.0
"""How long sampling waits for weights that are broadcast; the broadcast itself has the driver's deadline."""


@dataclass(frozen=True)
class ShardPlan:
    """What to sample for one shard. The same plan under the same weights gives the same rollout, bit for bit.

    Attributes:
        index: the shard's place in its step.
        prompt_ids: `[P]` the prompts' draws in the run.
        prompts: `[P]` their token ids.
        samples_per_prompt: responses to each.
        seeds: `[P * samples_per_prompt]` one for each response.
        temperature: 0 is greedy.
        max_response_tokens: a response is cut off here.
        stop: strings that end a response.
    """

    index: int
    prompt_ids: tuple[int, ...]
    prompts: tuple[NDArray[np.int32], ...]
    samples_per_prompt: int
    seeds: tuple[int, ...]
    temperature: float
    max_response_tokens: int
    stop: tuple[str, ...] = ()

    @property
    def sample_ids(self) -> NDArray[np.int64]:
        """`[P * samples_per_prompt]` of its responses, unique in the run."""
        count = self.samples_per_prompt
        return np.repeat(np.array(self.prompt_ids, dtype=np.int64) * count, count) + np.tile(
            np.arange(count), len(self.prompt_ids)
        )


def cut_into_shards(
    prompts: Sequence[tuple[int, NDArray[np.int32]]],
    seed: int,
    purpose: str,
    *,
    prompts_per_shard: int,
    samples_per_prompt: int,
    temperature: float,
    max_response_tokens: int,
    stop: tuple[str, ...] = (),
) -> list[ShardPlan]:
    """Cut prompts into shards; every response has a seed of its own, keyed by what it answers and never by its shard.

    Args:
        prompts: id and token ids of each; the last shard may have fewer than the others.
        seed: the run's.
        purpose: what is sampled for, part of the key.
    """
    groups = [prompts[start : start + prompts_per_shard] for start in range(0, len(prompts), prompts_per_shard)]
    return [
        ShardPlan(
            index=index,
            prompt_ids=tuple(number for number, _ in group),
            prompts=tuple(token_ids for _, token_ids in group),
            samples_per_prompt=samples_per_prompt,
            seeds=tuple(
                keyed_seed(seed, purpose, number, sample) for number, _ in group for sample in range(samples_per_prompt)
            ),
            temperature=temperature,
            max_response_tokens=max_response_tokens,
            stop=stop,
        )
        for index, group in enumerate(groups)
    ]


class Turns:
    """A lock that is given to its waiters in the order in which they came."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next, self._serving = 0, 0

    def __enter__(self) -> None:
        with self._changed:
            turn, self._next = self._next, self._next + 1
            self._changed.wait_for(lambda: self._serving == turn)

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._serving += 1
            self._changed.notify_all()


class Generator:
    """One vLLM engine in this process. `generate` may be called from several threads: their shards share the engine.

    Args:
        model: Hugging Face directory or hub id.
        settings: the engine.
        context_tokens: longest prompt and response together.
        eos_token_id: ends a response.
        weights: how new weights arrive, and what is allowed of them.
        in_flight_updates: new weights are loaded between two steps of the engine, and unfinished responses go on.
    """

    def __init__(
        self,
        model: str,
        settings: GeneratorSettings,
        context_tokens: int,
        eos_token_id: int,
        weights: WeightSettings,
        in_flight_updates: bool = False,
    ) -> None:
        self._on_gpu = on_gpu = settings.gpus > 0
        self._eos_token_id = eos_token_id
        self._in_flight = in_flight_updates
        self._version = UNTRAINED.version
        self._broadcast = weights.transport == "nccl"
        self._arrived = UNTRAINED.version
        self._arrival = threading.Condition()
        self._calls = 0
        self._turns = Turns()
        self._outputs: dict[str, Any] = {}
        self._limits = weights
        self._probed: Probed | None = None
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM
        from vllm.config import WeightTransferConfig

        from rlhf_ray.roles.weight_receiver import register_object_store_engine

        register_object_store_engine()
        # vLLM sees at its start that this share is free, even where the size of the cache is given.
        memory: dict[str, Any] = {"gpu_memory_utilization": settings.gpu_memory_utilization} if on_gpu else {}
        if settings.kv_cache_bytes is not None:
            memory["kv_cache_memory_bytes"] = settings.kv_cache_bytes
        arguments: dict[str, Any] = {
            "model": model,
            "dtype": resolve_dtype(settings.dtype, on_gpu),
            "max_model_len": context_tokens,
            "max_num_seqs": settings.max_concurrent_sequences,
            "tensor_parallel_size": settings.tensor_parallel,
            "enforce_eager": settings.enforce_eager,
            "distributed_executor_backend": "uni" if settings.tensor_parallel == 1 else "mp",
            "weight_transfer_config": WeightTransferConfig(backend=weights.transport),
            # Log-probs at the sampling temperature, as the learner computes them.
            "logprobs_mode": "processed_logprobs",
            # Sampling settings come from the plan alone, never from a file beside the model.
            "generation_config": "vllm",
            # Not what lies beside them: no pickles, no code.
            "load_format": "safetensors",
            "trust_remote_code": False,
            "seed": 0,
            "disable_log_stats": True,
            "enable_sleep_mode": settings.sleep,
            # On GPUs vLLM would begin a step before the one before is over, and new weights come between two steps.
            **({"async_scheduling": False} if in_flight_updates else {}),
            **memory,
            **settings.engine,
        }
        self._engine = LLM(**arguments)
        self._asleep = False
        self._engine.llm_engine.set_weight_version(str(UNTRAINED.version))
        # What `auto` became on this node, or `engine` asked for.
        self._dtype = str(self._engine.llm_engine.model_config.dtype).removeprefix("torch.")
        if weights.transport == "object_store":
            self._engine.init_weight_transfer_engine({"init_info": {}})

    def generate(self, plan: ShardPlan, snapshot: Snapshot) -> Rollout:
        """Sample one shard.

        Args:
            snapshot: the weights to sample with; loaded first where the engine has others. With `in_flight_updates`
                the oldest to sample with.

        Raises:
            RoleFailure: the weights could not be loaded, or the engine gave back fewer tokens or log-probs than it says
                it sampled.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        count = plan.samples_per_prompt
        prompts = [ids for ids in plan.prompts for _ in range(count)]
        sampling = [
            SamplingParams(
                temperature=plan.temperature,
                max_tokens=plan.max_response_tokens,
                logprobs=0,
                seed=seed,
                stop_token_ids=[self._eos_token_id],
                stop=list(plan.stop),
                include_stop_str_in_output=True,
                # Text is only needed to find stop strings in it.
                detokenize=bool(plan.stop),
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for seed in plan.seeds
        ]
        self._wait_for_arrival(snapshot)
        with self._turns:
            self._bring(snapshot)
            requests = self._add(prompts, sampling)
        outputs = self._finished(requests)
        sequences: list[NDArray[np.int32]] = []
        logprobs: list[float] = []
        versions: list[NDArray[np.int32]] = []
        for prompt, output in zip(prompts, outputs, strict=True):
            response = output.outputs[0]
            sampled = response.logprobs or []
            if len(sampled) != len(response.token_ids) or not response.token_ids:
                raise RoleFailure(
                    FailureKind.FATAL,
                    "generator",
                    "?",
                    f"the engine returned {len(response.token_ids)} tokens "
                    f"with {len(sampled)} log-probs (finish reason {response.finish_reason!r})",
                )
            sequences += [prompt, np.array(response.token_ids, dtype=np.int32)]
            logprobs += [entry[token].logprob for token, entry in zip(response.token_ids, sampled, strict=True)]
            versions.append(self._versions_of(response, snapshot.version))
        finished = [output.outputs[0].finish_reason == "stop" for output in outputs]
        prompt_ids = np.repeat(np.array(plan.prompt_ids, dtype=np.int64), count)
        return Rollout(
            tokens=np.concatenate(sequences),
            prompt_lengths=np.array([len(ids) for ids in prompts], dtype=np.int32),
            response_lengths=np.array([len(output.outputs[0].token_ids) for output in outputs], dtype=np.int32),
            logprobs=np.array(logprobs, dtype=np.float32),
            policy_versions=np.concatenate(versions),
            finish_reasons=np.where(finished, FINISH_STOP, FINISH_LENGTH).astype(np.int8),
            sample_ids=plan.sample_ids,
            prompt_ids=prompt_ids,
        )

    def load(self, snapshot: Snapshot, before: Probed | None = None) -> Probed:
        """Load new weights, unless the engine has them already, and see that it computes with them.

        Args:
            snapshot: with its proof.
            before: of the version before; None at the first.

        Raises:
            RoleFailure: it does not after two attempts.
        """
        self._wait_for_arrival(snapshot)
        with self._turns:
            self._bring(snapshot, before)
            assert self._probed is not None, "a snapshot with its proof has been loaded"
            return self._probed

    def sleep(self) -> None:
        """Give the GPU's memory back, until there is something to load or to sample. Weights go to the host."""
        with self._turns:
            self._finish_requests()
            self._engine.sleep(level=1)
            self._asleep = True

    def write(self, rollout: Rollout, path: str) -> None:
        """Keep a shard in a file of a checkpoint."""
        rollout.write(Path(path))

    def read(self, path: str) -> Rollout:
        """A shard that `write` kept."""
        return Rollout.read(Path(path))

    def gather(self, rollouts: list[Rollout], samples: list[list[int]]) -> Rollout:
        """Some samples of several shards as one shard; see `Rollout.gathered`."""
        return Rollout.gathered(rollouts, samples)

    def join_senders(self, init_info: dict[str, Any]) -> None:
        """Meet the policy learner in the group of the `nccl` transport."""
        self._engine.init_weight_transfer_engine({"init_info": init_info})

    def receive(self, update_info: dict[str, Any], version: int) -> None:
        """Take part in the learner's broadcast (`nccl` transport).

        Args:
            update_info: what is sent, as vLLM's trainer side describes it.
        """
        with self._turns:
            self._finish_requests()
            self._update({"update_info": update_info}, version)
        with self._arrival:
            self._arrived = version
            self._arrival.notify_all()

    def _wait_for_arrival(self, snapshot: Snapshot) -> None:
        """Weights that are broadcast arrive in a call of their own, which may get its turn after this one."""
        if not self._broadcast:
            return
        with waiting(), self._arrival:
            if not self._arrival.wait_for(lambda: self._arrived >= snapshot.version, _ARRIVAL_S):
                raise RoleFailure(
                    FailureKind.INFRASTRUCTURE,
                    "generator",
                    "?",
                    f"the weights of version {snapshot.version} were not broadcast within {_ARRIVAL_S:.0f} s; the "
                    f"engine has version {self._version}",
                )

    def _bring(self, snapshot: Snapshot, before: Probed | None = None) -> None:
        """Make the engine compute with these weights; with in-flight updates, with these or later ones."""
        if self._asleep:
            self._engine.wake_up()
            self._asleep = False
        if self._in_flight and snapshot.version < self._version:
            return
        probed = self._probed
        loaded = probed is not None and probed.version == self._version == snapshot.version
        compared = loaded and probed is not None and (before is None or probed.since == before.version)
        if self._version == snapshot.version and (snapshot.proof is None or compared):
            return
        # Where a shard has brought the weights already, they only have to be compared with those of before.
        faults: list[str] = []
        while len(faults) < _ATTEMPTS:
            fault = ("" if loaded else self._load(snapshot)) or self._prove(snapshot, before)
            if not fault:
                if faults and self._probed is not None:
                    parity = replace(self._probed.parity, first_fault=faults[0])
                    self._probed = replace(self._probed, parity=parity)
                return
            loaded = False
            faults.append(fault)
        self._version = _NO_VERSION
        raise RoleFailure(
            FailureKind.FATAL,
            "generator",
            "?",
            f"engine and learner disagree after {_ATTEMPTS} syncs to version {snapshot.version}: {faults[-1]}",
        )

    def _load(self, snapshot: Snapshot) -> str:
        """Load other weights; gives what was wrong with them, or nothing."""
        if not snapshot.names:
            if snapshot.version == self._version:
                return ""  # they were broadcast
            raise RoleFailure(
                FailureKind.INFRASTRUCTURE,
                "generator",
                "?",
                f"the engine has weights of version {self._version}, and there is nothing to load version "
                f"{snapshot.version} from",
            )
        self._finish_requests()
        try:
            self._update({"update_info": {"snapshot": snapshot}}, snapshot.version)
        except WeightsDamaged as damage:
            return str(damage)
        return ""

    def _prove(self, snapshot: Snapshot, before: Probed | None) -> str:
        """See that the engine computes as the learner does; gives what is wrong, or nothing.

        On a GPU vLLM's attention multiplies float32 in TF32, so that only a CPU's engine is exact.
        """
        if snapshot.proof is None:
            return ""
        learner = snapshot.proof.learner
        exact = self._dtype == learner.dtype == "float32" and not self._on_gpu
        engine = self._logprobs_of(snapshot.proof.tokens)
        self._probed = compare(self._limits, snapshot.version, engine, learner.data, exact=exact, before=before)
        return self._probed.parity.fault

    def _update(self, request: dict[str, Any], version: int) -> None:
        """New weights in place of the present ones.

        Keys and values of the old weights are dropped. Those of unfinished responses (in-flight updates) are computed
        again with the new ones, so that each token's log-prob is what its version alone says of the whole sequence.
        """
        self._engine.start_weight_update()
        self._version = _NO_VERSION  # until all is loaded
        self._engine.update_weights(request)
        self._engine.finish_weight_update(weight_version=str(version))
        if not self._engine.reset_prefix_cache(reset_running_requests=self._in_flight):
            raise RoleFailure(
                FailureKind.FATAL,
                "generator",
                "?",
                "the prefix cache could not be reset; stale keys and values would stay",
            )
        self._version = version

    def _finish_requests(self) -> None:
        """What was begun with the present weights ends with them, but for in-flight updates."""
        while not self._in_flight and self._engine.llm_engine.has_unfinished_requests():
            self._step()

    def _add(self, prompts: Sequence[NDArray[np.int32]], sampling: Sequence[Any]) -> list[str]:
        """Requests of one call, by the names that their outputs bear.

        Those of a call share the keys and values of a prompt, calls do not: what was sampled before, or with other
        weights, leaves no trace in a call's arithmetic.
        """
        from vllm.inputs import TokensPrompt

        self._calls += 1
        requests = [f"{self._calls}-{index}" for index in range(len(prompts))]
        for request, ids, each in zip(requests, prompts, sampling, strict=True):
            prompt = TokensPrompt(prompt_token_ids=ids.tolist(), cache_salt=f"{self._version}:{self._calls}")
            self._engine.llm_engine.add_request(request, prompt, each)
        return requests

    def _finished(self, requests: Sequence[str]) -> list[Any]:
        """The outputs of requests. Several calls may be here at once: each steps the engine for all in its turn."""
        while True:
            with self._turns:
                if self._step_unless_finished(requests):
                    return [self._outputs.pop(request) for request in requests]

    def _step_unless_finished(self, requests: Sequence[str]) -> bool:
        missing = [request for request in requests if request not in self._outputs]
        if not missing:
            return True
        if not self._engine.llm_engine.has_unfinished_requests():
            raise RoleFailure(FailureKind.FATAL, "generator", "?", f"the engine never finished {len(missing)} requests")
        self._step()
        return False

    def _step(self) -> None:
        for output in self._engine.llm_engine.step():
            if output.finished:
                self._outputs[output.request_id] = output

    def _logprobs_of(self, rows: tuple[NDArray[np.int32], ...]) -> NDArray[np.float32]:
        """`[N]` log-probs at temperature 1 of every token of the rows but each one's first, without sampling."""
        from vllm import SamplingParams

        scoring = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        requests = self._add(rows, [scoring] * len(rows))
        while not self._step_unless_finished(requests):
            pass
        outputs = [self._outputs.pop(request) for request in requests]
        logprobs = [
            entry[int(token)].logprob
            for ids, output in zip(rows, outputs, strict=True)
            for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)
        ]
        return np.array(logprobs, dtype=np.float32)

    def _versions_of(self, response: Any, wanted: int) -> NDArray[np.int32]:
        """`[R]` which weights sampled each token, by the engine's own account."""
        versions = np.full(len(response.token_ids), _NO_VERSION, dtype=np.int32)
        for span in response.weight_versions or ():
            versions[span.start : span.end] = int(span.version)
        right = versions >= wanted if self._in_flight else versions == wanted
        if not right.all():
            found = sorted(set(versions[~right].tolist()))
            raise RoleFailure(
                FailureKind.FATAL,
                "generator",
                "?",
                f"tokens were sampled with weights of version {found}, not {wanted} as was asked",
            )
        return versions
