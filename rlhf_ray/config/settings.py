"""The typed, frozen settings. A role is handed its own section, never the whole.

Every field has a description: `docs/settings.md` is generated from them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from rlhf_ray.config.algorithm import ADVANTAGES, AlgorithmSettings
from rlhf_ray.config.base import (
    ActorSettings,
    DType,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    OffIsAWord,
    PositiveFloat,
    PositiveInt,
    Settings,
    check_batch,
    check_sharded,
)
from rlhf_ray.config.lora import LoraSettings
from rlhf_ray.config.reward import RewardSources

_OPENS_PICKLES = ("auto", "hf", "pt", "npcache")
"""Formats of vLLM's `load_format`."""


class PathSettings(Settings):
    """Folders that other keys refer to as `${paths.data}` and `${paths.runs}`."""

    data: str = Field("data", description="Where `rlhf-ray prepare` writes models and data sets.")
    runs: str = Field("runs", description="Where run folders are made.")


class RunSettings(Settings):
    """Which run this is."""

    name: str = Field(
        description="Name of the run; its folder is `<paths.runs>/<run.name>`.", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
    )
    seed: NonNegativeInt = Field(
        0,
        description="The one seed. Every random draw is keyed by it and by what is "
        "drawn (step, prompt, sample), never by time or arrival order.",
    )


class ClusterSettings(Settings):
    """Where the roles run."""

    address: str | None = Field(
        None,
        description="Ray cluster to join. Empty: the cluster of `RAY_ADDRESS` (set inside `ray job submit`), "
        "or a new one on this machine. `auto`: the cluster already running here.",
    )
    num_cpus: PositiveInt | None = Field(
        None, description="Logical CPUs of a newly started local cluster; empty: as many as the machine has."
    )
    object_store_gib: PositiveFloat = Field(
        1.0,
        description="Object store of a newly started local cluster, GiB. Needs room for `algorithm.max_staleness` + 1 "
        "versions of the trained weights, and for rollouts.",
    )
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK", description="How Ray spreads the replicas of a role over the nodes."
    )
    placement_timeout_s: PositiveFloat = Field(
        30.0,
        description="How long to wait until the cluster has room for all roles, at the start and when a node was lost. "
        "Longer where an autoscaler has to bring nodes.",
    )
    start_timeout_s: PositiveFloat = Field(900.0, description="How long the roles may take to load their models.")
    call_timeout_s: PositiveFloat = Field(
        3600.0,
        description="How long the driver waits for the answers that it needs next, all of them together: all sampling "
        "and scoring of a step, say.",
    )
    silent_after_s: PositiveFloat = Field(
        45.0,
        description="A process that neither responds nor computes for so long, or whose call makes no progress for so "
        "long, is killed and treated as crashed. Calls that declare that they wait for others are left alone.",
    )
    max_restarts: NonNegativeInt = Field(
        3,
        description="How often a lost process is replaced, and how often a learner's ranks are rebuilt, within "
        "`restart_window_s`; one more ends the run. 0: the first loss ends it.",
    )
    restart_window_s: PositiveFloat = Field(3600.0, description="See `max_restarts`.")


class LearnerSettings(ActorSettings):
    """How a model is trained (DeepSpeed)."""

    dtype: DType = Field(
        "auto",
        description="Compute type. `auto`: bfloat16 on a GPU or a CPU with bf16 "
        "instructions, else float32. Master weights and optimizer state stay in float32.",
    )
    trainable_top_layers: NonNegativeInt | None = Field(
        None, description="Train only the last k transformer layers (with the final norm and the head); empty: all."
    )
    gradient_checkpointing: bool = Field(False, description="Trade compute for memory in the backward pass.")
    attention: str = Field(
        "auto",
        description="Attention kernel. `auto`: `packed_sdpa`, exact and without cost for neighbours in the pack (on a "
        "GPU in half precision torch's own FlashAttention); else any name that transformers knows and that takes "
        "packed sequences, such as `flash_attention_2` with `flash-attn` installed.",
    )
    float32_logits: bool = Field(
        True,
        description="Compute the output projection in float32 whatever the type. Logits rounded to bfloat16 are "
        "the largest part of the mismatch between engine and learner that the learner can avoid; costs a float32 copy "
        "of the projection.",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage; 3 also shards the weights.")
    deepspeed: dict[str, object] = Field(
        default_factory=dict,
        description="Merged into the DeepSpeed configuration as it is, such as communication options, or "
        "`{zero_optimization: {offload_optimizer: {device: cpu}}}` to keep the optimizer's state and step on the CPU.",
    )
    learning_rate: PositiveFloat = Field(1e-6, description="Peak learning rate of AdamW.")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="Shape after the warm-up.")
    warmup_steps: NonNegativeInt = Field(0, description="Optimizer steps over which the rate rises from 0.")
    min_lr_ratio: Fraction = Field(0.0, description="Where `linear` and `cosine` end, as a share of the peak.")
    adam_beta1: Fraction = Field(0.9, description="AdamW β1.")
    adam_beta2: Fraction = Field(0.95, description="AdamW β2.")
    adam_epsilon: PositiveFloat = Field(1e-8, description="AdamW ε.")
    weight_decay: NonNegativeFloat = Field(0.0, description="AdamW weight decay (matrices only).")
    max_grad_norm: PositiveFloat = Field(1.0, description="Gradients are clipped to this norm.")
    micro_batch_tokens: PositiveInt = Field(
        4096,
        description="Most tokens in one packed forward pass. Memory and speed only: the result does not depend on it.",
    )

    @model_validator(mode="after")
    def _one_gpu_a_rank(self) -> LearnerSettings:
        if self.gpus not in (0, 1):
            raise ValueError(f"gpus: {self.gpus:g} for one rank; a learner's rank has one whole GPU, or 0 for the CPU")
        return self


class PolicySettings(Settings):
    """The model that is trained to be preferred."""

    model: str = Field(description="Hugging Face directory (or hub id) of the policy.")
    learner: LearnerSettings = Field(default_factory=LearnerSettings, description="How it is trained.")
    lora: LoraSettings | None = Field(None, description="Train low-rank adapters only; empty: the weights themselves.")

    @model_validator(mode="after")
    def _adapters_are_all_that_is_trained(self) -> PolicySettings:
        if self.lora is not None and self.learner.trainable_top_layers is not None:
            raise ValueError(
                f"lora: trains adapters only, but learner.trainable_top_layers is {self.learner.trainable_top_layers}; "
                "leave one of them empty"
            )
        if self.lora is not None and self.lora.dropout:
            raise ValueError(
                f"lora.dropout: {self.lora.dropout:g}; the ratio of new to old log-probs would not be 1 before an "
                "update, so a policy has none"
            )
        return self


class CriticSettings(Settings):
    """The value model of PPO."""

    model: str | None = Field(
        None,
        description="Where the backbone comes from; empty: the policy's model. Values start at 0; at its scores "
        "with a reward model of one label.",
    )
    learner: LearnerSettings = Field(default_factory=LearnerSettings, description="How it is trained.")


class ReferenceSettings(ActorSettings):
    """The frozen model that the KL penalty is measured against."""

    model: str | None = Field(None, description="Empty: the policy's model before training.")
    dtype: DType = Field("auto", description="Compute type, as for the learner.")
    attention: str = Field("auto", description="As for the learner.")
    float32_logits: bool = Field(True, description="As for the learner.")
    micro_batch_tokens: PositiveInt = Field(4096, description="Most tokens in one packed forward pass.")
    sharded: bool = Field(
        False,
        description="Spread the weights of one model over all `replicas` (ZeRO-3), for a model that does not fit one "
        "GPU. Off: each replica holds all of it.",
    )

    @model_validator(mode="after")
    def _ranks_that_share_the_weights(self) -> ReferenceSettings:
        if self.sharded:
            check_sharded(self)
        return self


class GeneratorSettings(ActorSettings):
    """The engine that samples responses (vLLM)."""

    dtype: DType = Field("auto", description="Compute type, as for the learner.")
    tensor_parallel: PositiveInt = Field(
        1, description="GPUs over which one engine is spread; equal to `gpus`, which may be below 1 where this is 1."
    )
    kv_cache_gib: PositiveFloat | None = Field(
        None,
        description="KV cache in GiB. Empty: 0.5 on a CPU, where an engine that chooses would claim nearly all memory; "
        "on a GPU `gpu_memory_utilization` decides.",
    )
    gpu_memory_utilization: Fraction = Field(0.85, description="Share of a GPU's memory the engine may use.")
    max_concurrent_sequences: PositiveInt = Field(256, description="Most responses in flight in one engine.")
    shards_in_flight: PositiveInt | None = Field(
        None,
        description="Shards that one engine samples at the same time. Empty: 1 on a CPU, where it is computing anyway; "
        "4 on a GPU, which one shard leaves idle.",
    )
    sleep: bool = Field(
        False,
        description="Share GPUs with the policy's learner: generator i has the GPU of rank i, and gives its memory "
        "back while the learner works (vLLM's sleep mode, level 1). What the learner keeps between steps stays there, "
        "so `gpu_memory_utilization` must leave room for it. Needs `max_staleness` 0.",
    )
    enforce_eager: bool = Field(True, description="No CUDA graphs, no compilation. Turn off on GPUs for speed.")
    engine: dict[str, object] = Field(
        default_factory=dict,
        description="Further vLLM engine arguments, as they are; but neither `trust_remote_code`, nor a `load_format` "
        "that opens pickles, nor an `hf_token` (the environment variable `HF_TOKEN` is read).",
    )

    @field_validator("engine")
    @classmethod
    def _engine_runs_nobodys_code(cls, engine: dict[str, object]) -> dict[str, object]:
        if engine.get("trust_remote_code"):
            raise ValueError("trust_remote_code: code that lies beside a model is never run; remove it")
        if engine.get("load_format", "safetensors") in _OPENS_PICKLES:
            raise ValueError(f"load_format: '{engine['load_format']}' opens pickles; 'safetensors', or leave it out")
        if isinstance(engine.get("hf_token"), str):
            raise ValueError("hf_token: the configuration is kept in the run's folder; set HF_TOKEN in the environment")
        return engine

    @model_validator(mode="after")
    def _has_the_gpus_it_is_spread_over(self) -> GeneratorSettings:
        shares_one = 0 < self.gpus < 1 and self.tensor_parallel == 1
        if self.gpus and self.gpus != self.tensor_parallel and not shares_one:
            raise ValueError(
                f"gpus: {self.gpus:g} for an engine spread over {self.tensor_parallel} (tensor_parallel); the two must "
                "be equal (an engine on one GPU may also share it: gpus below 1)"
            )
        if not self.gpus and self.tensor_parallel > 1:
            raise ValueError(
                f"tensor_parallel: {self.tensor_parallel} needs as many gpus, but gpus is 0; an engine on a CPU is not "
                "spread"
            )
        return self

    @property
    def concurrent_calls(self) -> int:
        """Shards in flight."""
        return self.shards_in_flight or (4 if self.gpus else 1)

    @property
    def kept_block_bytes(self) -> int:
        """Less than elsewhere: each version of the weights passes through, and large blocks that are kept are cut up by
        the small ones, so that the process grows. What sampling itself uses is smaller."""
        return 32 << 20

    @property
    def kv_cache_bytes(self) -> int | None:
        """Size of the KV cache, or None where the share of the GPU's memory decides."""
        gib = 0.5 if self.kv_cache_gib is None and not self.gpus else self.kv_cache_gib
        return None if gib is None else int(gib * (1 << 30))


class SamplingSettings(Settings):
    """How much is sampled each step, and how."""

    prompts_per_step: PositiveInt = Field(16, description="Prompts that one step trains on.")
    spare_prompts: NonNegativeInt = Field(
        0,
        description="Prompts that each step samples beside these, to take the place of those whose responses all have "
        "the same score (dynamic sampling). Needs `algorithm.drop_uniform_groups`. About `prompts_per_step` · u / (1 − "
        "u) fill a step where `group/uniform_fraction` is u.",
    )
    samples_per_prompt: PositiveInt = Field(4, description="Responses to each prompt; they form a group.")
    prompts_per_shard: PositiveInt = Field(
        8,
        description="Prompts of one shard, the unit of work: sampled by one "
        "generator and sampled again bit for bit wherever it is repeated.",
    )
    temperature: PositiveFloat = Field(
        1.0, description="Sampling temperature; the learner divides its logits by the same."
    )
    max_prompt_tokens: PositiveInt = Field(256, description="A longer prompt is bad input.")
    max_response_tokens: PositiveInt = Field(128, description="A response is cut off here.")
    stop: tuple[str, ...] = Field(
        (),
        description="Strings that end a response, as the end-of-sequence token does; they stay part of it.",
    )

    @model_validator(mode="before")
    @classmethod
    def _whole_distribution(cls, values: Any) -> Any:
        for name in ("top_p", "top_k", "min_p"):
            if isinstance(values, dict) and name in values:
                raise ValueError(
                    f"{name}: it cuts the distribution off, token by token, where the learner computes the whole one: "
                    "log-probs of engine and learner would not be of the same policy; lower temperature instead"
                )
        return values

    @model_validator(mode="after")
    def _shards_divide_the_step(self) -> SamplingSettings:
        if self.prompts_per_step % self.prompts_per_shard:
            raise ValueError(
                f"prompts_per_step ({self.prompts_per_step}) must be a multiple of prompts_per_shard "
                f"({self.prompts_per_shard})"
            )
        if self.spare_prompts % self.prompts_per_shard:
            raise ValueError(
                f"spare_prompts ({self.spare_prompts}) must be a multiple of prompts_per_shard "
                f"({self.prompts_per_shard})"
            )
        return self

    @property
    def prompts_drawn(self) -> int:
        """Prompts that a step samples."""
        return self.prompts_per_step + self.spare_prompts

    @property
    def num_shards(self) -> int:
        """Shards that a step trains on."""
        return self.prompts_per_step // self.prompts_per_shard


class PromptSettings(Settings):
    """Where prompts come from."""

    path: str = Field(
        description="JSONL or Parquet file, folder, or `datasets` name; rows have `prompt` (a string or chat "
        "messages) and may have `label`, which goes with the prompt to the scorers."
    )
    split: str | None = Field(None, description="Split of a `datasets` name, such as `train`.")
    field: str = Field("prompt", description="Column with the prompt.")
    limit: PositiveInt | None = Field(None, description="Use only the first n rows.")
    on_bad_row: Literal["fail", "skip"] = Field(
        "fail", description="A row that cannot be used ends the run, or is counted, listed and left out."
    )


class WeightSettings(Settings):
    """How new weights reach the engine."""

    transport: Literal["object_store", "nccl"] = Field(
        "object_store",
        description="`object_store` works on CPUs and GPUs, for engines on one GPU; `nccl` is "
        "vLLM's own engine for learners and generators on separate GPUs.",
    )
    bucket_mib: PositiveInt = Field(64, description="Size of one bucket of weights.")
    probe_tokens: PositiveInt = Field(
        64,
        description="Prompt tokens on which engine and learner are compared after every sync: they must agree, and "
        "the engine's log-probs must have changed as the learner's have.",
    )
    max_abs_dlogp_float32: PositiveFloat = Field(
        1e-4,
        description="Largest |Δ log-prob| allowed when engine and learner compute in float32 on CPUs. (On a GPU vLLM's "
        "attention multiplies float32 in TF32: 5e-4 apart on an H200.)",
    )
    max_median_dlogp_bfloat16: PositiveFloat = Field(
        0.3,
        description="Largest median |Δ log-prob| allowed otherwise. Rounding is hundredths of a nat, and grows "
        "with the logits.",
    )


class EvaluationSettings(Settings):
    """Held-out judgement before and after training."""

    prompts: PromptSettings | None = Field(None, description="Held-out prompts; empty: no evaluation.")
    samples_per_prompt: PositiveInt = Field(1, description="Responses to each held-out prompt.")
    judge: Literal["none", "vader"] = Field("none", description="Independent judge of the responses, never trained on.")
    page_samples: PositiveInt = Field(24, description="Prompts shown side by side on the samples page.")
    every_steps: PositiveInt | None = Field(
        None,
        description="Judge the policy every n steps as well (`held_out/*`); empty: before and after training only.",
    )
    keep_best: Literal["reward", "judge"] | None = Field(
        None,
        description="Write the policy with the best mean of this on held-out prompts to `policy_best/`. The reward is "
        "what is being optimised; a judge that is never trained on says more. Needs `every_steps`.",
    )

    @model_validator(mode="after")
    def _best_of_something(self) -> EvaluationSettings:
        for name in ("every_steps", "keep_best"):
            if getattr(self, name) is not None and self.prompts is None:
                raise ValueError(f"{name}: there is nothing to judge on without evaluation.prompts")
        if self.keep_best is not None and self.every_steps is None:
            raise ValueError("keep_best: without every_steps the policy is judged at the end only")
        if self.keep_best == "judge" and self.judge == "none":
            raise ValueError("keep_best: 'judge' needs a judge, and judge is 'none'")
        return self


class CheckpointSettings(Settings):
    """Checkpointing."""

    every_steps: PositiveInt = Field(10, description="A checkpoint every n steps (and at a stop).")
    keep: PositiveInt = Field(2, description="Newest checkpoints kept.")
    copy_to: str | None = Field(
        None,
        description="A URL that fsspec knows (`s3://bucket/runs`, `gs://bucket/runs`): each complete checkpoint and "
        "the run's other files are copied below it, and `--resume` in an empty folder begins with the newest of them. "
        "Some need a package more (`s3fs`, `gcsfs`); credentials come from the environment.",
    )

    @field_validator("copy_to")
    @classmethod
    def _without_credentials(cls, value: str | None) -> str | None:
        if value is not None and urlsplit(value).password is not None:
            # The configuration is kept in the run's folder, and shown.
            raise ValueError("it holds a password; credentials come from the environment")
        return value


class WandbSettings(Settings):
    """Weights & Biases."""

    mode: Literal["disabled", "offline", "online"] = Field(
        "disabled", description="`offline` writes into the run folder."
    )
    project: str = Field("rlhf-ray", description="Project name.")


class TrackingSettings(Settings):
    """Where metrics go besides `metrics.jsonl`."""

    wandb: WandbSettings = Field(default_factory=WandbSettings, description="Weights & Biases.")
    tensorboard: bool = Field(False, description="Write TensorBoard files into the run folder.")
    trace_steps: NonNegativeInt = Field(
        3, description="First steps of a PPO run whose timeline is written to `trace.json` (Chrome's trace format)."
    )
    progress: Annotated[Literal["auto", "live", "lines", "off"], OffIsAWord] = Field(
        "auto", description="Display: `live` on a terminal, one line a step elsewhere."
    )


class RunConfig(Settings):
    """What every command's configuration has."""

    run: RunSettings = Field(description="Which run this is.")
    paths: PathSettings = Field(default_factory=PathSettings, description="Folders.")
    cluster: ClusterSettings = Field(default_factory=ClusterSettings, description="Where the roles run.")
    tracking: TrackingSettings = Field(default_factory=TrackingSettings, description="Where metrics go.")


class PPOConfig(RunConfig):
    """Everything `rlhf-ray ppo` reads."""

    steps: PositiveInt = Field(100, description="Steps of sampling and training.")
    prompts: PromptSettings = Field(description="Prompts to train on.")
    policy: PolicySettings = Field(description="The policy.")
    critic: CriticSettings | None = Field(None, description="The critic; only where `algorithm.advantage` needs one.")
    reference: ReferenceSettings | None = Field(
        default_factory=ReferenceSettings,
        description="The reference; null only when `algorithm.kl.coefficient` is 0. Left out with `policy.lora`: the "
        "policy without its adapters is the reference, and its learner computes the log-probs.",
    )
    reward: RewardSources = Field(
        description="Where rewards come from: one source, or a list of sources whose weighted scores are added."
    )
    generator: GeneratorSettings = Field(default_factory=GeneratorSettings, description="The engine.")
    sampling: SamplingSettings = Field(default_factory=SamplingSettings, description="How much is sampled, and how.")
    algorithm: AlgorithmSettings = Field(default_factory=AlgorithmSettings, description="The algorithm.")
    weights: WeightSettings = Field(default_factory=WeightSettings, description="How new weights reach the engine.")
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings, description="Held-out judgement.")
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings, description="Checkpointing.")

    @model_validator(mode="after")
    def _roles_fit_the_algorithm(self) -> PPOConfig:
        algorithm, sampling = self.algorithm, self.sampling
        needs = ADVANTAGES[algorithm.advantage]
        if needs.critic and self.critic is None:
            without = " or ".join(f"'{name}'" for name, each in ADVANTAGES.items() if not each.critic)
            raise ValueError(
                f"critic: algorithm.advantage is '{algorithm.advantage}', which needs a critic section; use {without} "
                "without"
            )
        if not needs.critic and self.critic is not None:
            raise ValueError(
                f"critic: algorithm.advantage is '{algorithm.advantage}', which has no critic; remove the section"
            )
        if not needs.critic and algorithm.critic_warmup_steps:
            raise ValueError(f"algorithm.critic_warmup_steps: '{algorithm.advantage}' has no critic to warm up")
        if algorithm.critic_warmup_steps >= self.steps:
            raise ValueError(
                f"algorithm.critic_warmup_steps: {algorithm.critic_warmup_steps} of {self.steps} steps leave none for "
                "the policy; fewer than steps"
            )
        if needs.group and sampling.samples_per_prompt < 2:
            raise ValueError(
                f"sampling.samples_per_prompt: '{algorithm.advantage}' compares the samples of a prompt; at least 2"
            )
        if sampling.spare_prompts and not algorithm.drop_uniform_groups:
            raise ValueError(
                "sampling.spare_prompts: they take the place of prompts whose responses all have the same score, which "
                "are trained on unless algorithm.drop_uniform_groups is true"
            )
        if algorithm.length.rescale and sampling.samples_per_prompt < 2:
            raise ValueError("sampling.samples_per_prompt: algorithm.length.rescale compares lengths; at least 2")
        for name, tokens in (
            ("target", algorithm.length.target),
            ("overlong_buffer", algorithm.length.overlong_buffer),
        ):
            if tokens is not None and tokens > sampling.max_response_tokens:
                raise ValueError(
                    f"algorithm.length.{name}: {tokens} is more than sampling.max_response_tokens "
                    f"({sampling.max_response_tokens})"
                )
        if algorithm.kl.placement == "loss" and algorithm.kl.estimator == "k1":
            raise ValueError("algorithm.kl.estimator: 'k1' in the loss has no gradient on average; use 'k2' or 'k3'")
        if algorithm.kl.controller == "adaptive" and (algorithm.kl.coefficient == 0 or self.reference is None):
            raise ValueError(
                "algorithm.kl.controller: 'adaptive' multiplies the coefficient, which must start above 0, and needs "
                "a reference section"
            )
        if self.policy.lora is not None and self.reference not in (None, ReferenceSettings()):
            raise ValueError(
                "reference: with policy.lora the policy without its adapters is the reference, and no role has one of "
                "its own; remove the section"
            )
        if self.reference is None and algorithm.kl.coefficient > 0:
            raise ValueError("reference: algorithm.kl.coefficient is above 0, which needs a reference section")
        if sampling.prompts_per_shard * sampling.samples_per_prompt < algorithm.minibatches:
            raise ValueError(
                f"algorithm.minibatches: {algorithm.minibatches} is more than the "
                f"{sampling.prompts_per_shard * sampling.samples_per_prompt} samples of a shard"
            )
        for name, learner in (("policy", self.policy.learner), ("critic", self.critic and self.critic.learner)):
            if learner and sampling.num_shards % learner.replicas:
                raise ValueError(
                    f"{name}.learner.replicas: {learner.replicas} ranks cannot share {sampling.num_shards} shards "
                    "evenly (sampling.prompts_per_step / sampling.prompts_per_shard)"
                )
        if algorithm.in_flight_updates and not algorithm.max_staleness:
            raise ValueError(
                "algorithm.in_flight_updates: with max_staleness 0 nothing is sampled while weights change; 1 or more"
            )
        if self.reference is not None and self.reference.sharded and sampling.num_shards % self.reference.replicas:
            raise ValueError(
                f"reference.replicas: {self.reference.replicas} ranks that share one model cannot share "
                f"{sampling.num_shards} shards evenly (sampling.prompts_per_step / sampling.prompts_per_shard)"
            )
        self._check_shared_gpus()
        if self.weights.transport == "nccl" and (self.generator.gpus == 0 or self.policy.learner.gpus == 0):
            raise ValueError(
                "weights.transport: 'nccl' needs generator.gpus and policy.learner.gpus above 0; use 'object_store'"
            )
        if self.weights.transport == "object_store" and self.generator.tensor_parallel > 1:
            raise ValueError(
                f"weights.transport: 'object_store' does not reach the processes of an engine that is spread over "
                f"{self.generator.tensor_parallel} GPUs (generator.tensor_parallel), which are none of Ray's; 'nccl'"
            )
        return self

    def _check_shared_gpus(self) -> None:
        """What `generator.sleep` needs.

        Raises:
            ValueError: naming what stands against it.
        """
        generator, learner = self.generator, self.policy.learner
        if not generator.sleep:
            return
        if generator.gpus != 1 or learner.gpus != 1:
            raise ValueError(
                f"generator.sleep: gpus is {generator.gpus:g}, and that of policy.learner {learner.gpus:g}; both must "
                "be 1, the GPU that each engine shares with one rank (on a CPU vLLM has no sleep mode)"
            )
        if generator.replicas != learner.replicas:
            raise ValueError(
                f"generator.sleep: {generator.replicas} engines cannot share the GPUs of {learner.replicas} ranks "
                "(generator.replicas, policy.learner.replicas); as many of the one as of the other"
            )
        if self.algorithm.max_staleness:
            raise ValueError(
                "generator.sleep: with algorithm.max_staleness above 0 the engine samples while the learner works, and "
                "never sleeps; 0, or GPUs of their own"
            )
        if self.weights.transport == "nccl":
            raise ValueError(
                "generator.sleep: NCCL refuses two members of a group on one GPU; weights.transport 'object_store'"
            )

    @property
    def reference_role(self) -> ReferenceSettings | None:
        """The reference where it is a role of its own: adapters can be switched off, so they need none."""
        return None if self.policy.lora is not None else self.reference


class TextSettings(Settings):
    """Training text of a supervised warm-up."""

    path: str = Field(
        description="JSONL or Parquet file, folder, or `datasets` name; rows have `text`, or `prompt` and "
        "`response` (only the response is learned)."
    )
    split: str | None = Field(None, description="Split of a `datasets` name.")
    limit: PositiveInt | None = Field(None, description="Use only the first n rows.")
    max_tokens: PositiveInt = Field(512, description="Longest row.")
    on_too_long: Literal["fail", "truncate", "skip"] = Field(
        "fail", description="A longer row is bad input, is cut and counted, or is left out and counted."
    )
    on_bad_row: Literal["fail", "skip"] = Field("fail", description="As for prompts.")


class SFTConfig(RunConfig):
    """Everything `rlhf-ray sft` reads."""

    text: TextSettings = Field(description="Training text.")
    policy: PolicySettings = Field(description="The model.")
    steps: PositiveInt | None = Field(None, description="Optimizer steps; empty: `epochs` passes.")
    epochs: PositiveInt = Field(1, description="Passes over the text.")
    batch_size: PositiveInt = Field(32, description="Rows of one optimizer step, over all ranks.")
    checkpoint: CheckpointSettings = Field(
        default_factory=lambda: CheckpointSettings(every_steps=50), description="Checkpointing."
    )

    @model_validator(mode="after")
    def _rows_for_every_rank(self) -> SFTConfig:
        check_batch(self.batch_size, "batch_size", self.policy.learner.replicas, "policy.learner")
        return self
