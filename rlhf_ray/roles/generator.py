"""Sampling responses with vLLM, and loading new weights between shards."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.algorithms.parity import Parity, ParityCheck
from rlhf_ray.config.settings import GeneratorSettings, WeightSettings
from rlhf_ray.failures import FailureKind, RoleFailure
from rlhf_ray.models.buckets import Snapshot, WeightsDamaged
from rlhf_ray.models.loading import resolve_dtype
from rlhf_ray.randomness import keyed_seed
from rlhf_ray.rollout import FINISH_LENGTH, FINISH_STOP, ProbeColumn, Rollout

_NO_VERSION = -1


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
    """

    index: int
    prompt_ids: tuple[int, ...]
    prompts: tuple[NDArray[np.int32], ...]
    samples_per_prompt: int
    seeds: tuple[int, ...]
    temperature: float
    max_response_tokens: int


def cut_into_shards(
    prompts: Sequence[tuple[int, NDArray[np.int32]]],
    seed: int,
    purpose: str,
    *,
    prompts_per_shard: int,
    samples_per_prompt: int,
    temperature: float,
    max_response_tokens: int,
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
    """

    def __init__(
        self,
        model: str,
        settings: GeneratorSettings,
        context_tokens: int,
        eos_token_id: int,
        weights: WeightSettings,
    ) -> None:
        on_gpu = settings.gpus > 0
        self._eos_token_id = eos_token_id
        self._version = 0
        self._calls = 0
        self._turns = Turns()
        self._outputs: dict[str, Any] = {}
        self._parity = ParityCheck(weights)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM
        from vllm.config import WeightTransferConfig

        from rlhf_ray.roles.weight_receiver import register_object_store_engine

        register_object_store_engine()
        memory: dict[str, Any] = {"gpu_memory_utilization": settings.gpu_memory_utilization}
        if settings.kv_cache_bytes is not None:
            memory = {"kv_cache_memory_bytes": settings.kv_cache_bytes}
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
            "seed": 0,
            "disable_log_stats": True,
            **memory,
            **settings.engine,
        }
        self._engine = LLM(**arguments)
        # What `auto` became on this node, or `engine` asked for.
        self._dtype = str(self._engine.llm_engine.model_config.dtype).removeprefix("torch.")
        if weights.transport == "object_store":
            self._engine.init_weight_transfer_engine({"init_info": {}})

    def generate(self, plan: ShardPlan, snapshot: Snapshot) -> Rollout:
        """Sample one shard.

        Args:
            snapshot: the weights to sample with; loaded first where the engine has another version.

        Raises:
            RoleFailure: the engine gave back fewer tokens or log-probs than it says it sampled.
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
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for seed in plan.seeds
        ]
        with self._turns:
            if snapshot.version != self._version:
                self._load(snapshot)
            requests = self._add(prompts, sampling)
        outputs = self._finished(requests)
        sequences: list[NDArray[np.int32]] = []
        logprobs: list[float] = []
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
        finished = [output.outputs[0].finish_reason == "stop" for output in outputs]
        prompt_ids = np.repeat(np.array(plan.prompt_ids, dtype=np.int64), count)
        return Rollout(
            tokens=np.concatenate(sequences),
            prompt_lengths=np.array([len(ids) for ids in prompts], dtype=np.int32),
            response_lengths=np.array([len(output.outputs[0].token_ids) for output in outputs], dtype=np.int32),
            logprobs=np.array(logprobs, dtype=np.float32),
            policy_versions=np.full(len(logprobs), snapshot.version, dtype=np.int32),
            finish_reasons=np.where(finished, FINISH_STOP, FINISH_LENGTH).astype(np.int8),
            sample_ids=prompt_ids * count + np.tile(np.arange(count), len(plan.prompts)),
            prompt_ids=prompt_ids,
        )

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
                missing = [request for request in requests if request not in self._outputs]
                if not missing:
                    return [self._outputs.pop(request) for request in requests]
                if not self._engine.llm_engine.has_unfinished_requests():
                    raise RoleFailure(
                        FailureKind.FATAL, "generator", "?", f"the engine never finished {len(missing)} requests"
                    )
                self._step()

    def _step(self) -> None:
        for output in self._engine.llm_engine.step():
            if output.finished:
                self._outputs[output.request_id] = output

    def synchronize(self, snapshot: Snapshot, probe: tuple[NDArray[np.int32], ...], learner: ProbeColumn) -> Parity:
        """Load new weights, and see that the engine computes with them.

        Args:
            snapshot: the weights; without tensors, they have arrived by `receive`.
            probe: prompts, the same at every version.
            learner: the learner's log-probs of the probe's tokens under these weights.
        """
        try:
            with self._turns:
                if snapshot.names or snapshot.version != self._version:
                    self._load(snapshot)
        except WeightsDamaged as damage:
            return Parity.without_weights(snapshot.version, str(damage))
        exact = self._dtype == learner.dtype == "float32"
        return self._parity.judge(snapshot.version, self._probe(probe), learner.data, exact=exact)

    def _probe(self, probe: tuple[NDArray[np.int32], ...]) -> NDArray[np.float32]:
        """`[N]` log-probs at temperature 1 of every token of the probe but each prompt's first, without sampling."""
        from vllm import SamplingParams

        scoring = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        with self._turns:
            requests = self._add(probe, [scoring] * len(probe))
        logprobs = [
            entry[int(token)].logprob
            for ids, output in zip(probe, self._finished(requests), strict=True)
            for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)
        ]
        return np.array(logprobs, dtype=np.float32)

    def _load(self, snapshot: Snapshot) -> None:
        """Load other weights, once everything that was begun with the present ones has ended."""
        while self._engine.llm_engine.has_unfinished_requests():
            self._step()
        if not snapshot.names:
            raise RoleFailure(
                FailureKind.INFRASTRUCTURE,
                "generator",
                "?",
                f"the engine has weights of version {self._version}, and there is nothing to load version "
                f"{snapshot.version} from",
            )
        self._engine.start_weight_update()
        self._version = _NO_VERSION  # until all is loaded
        self._engine.update_weights({"update_info": {"snapshot": snapshot}})
        self._finish_update(snapshot.version)

    def join_senders(self, init_info: dict[str, Any]) -> None:
        """Meet the policy learner in the group of the `nccl` transport."""
        self._engine.init_weight_transfer_engine({"init_info": init_info})

    def receive(self, update_info: dict[str, Any], version: int) -> None:
        """Take part in the learner's broadcast (`nccl` transport).

        Args:
            update_info: what is sent, as vLLM's trainer side describes it.
        """
        self._engine.start_weight_update()
        self._engine.update_weights({"update_info": update_info})
        self._finish_update(version)

    def _finish_update(self, version: int) -> None:
        self._engine.finish_weight_update(weight_version=str(version))
        if not self._engine.reset_prefix_cache():
            raise RoleFailure(
                FailureKind.FATAL,
                "generator",
                "?",
                "the prefix cache could not be reset; stale keys and values would stay",
            )
        self._version = version
