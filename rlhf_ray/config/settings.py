"""The typed, frozen settings. A role is handed its own section, never the whole.

Every field has a description: `docs/settings.md` is generated from them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# YAML 1.1 reads a bare `off` as false.
OffIsAWord = BeforeValidator(lambda value: "off" if value is False else value)


class Settings(BaseModel):
    """A section of a configuration file: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, coerce_numbers_to_str=True
    )


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
    object_store_gib: PositiveFloat = Field(1.0, description="Object store of a newly started local cluster, GiB.")
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK", description="How Ray spreads the replicas of a role over the nodes."
    )
    placement_timeout_s: PositiveFloat = Field(
        120.0, description="How long to wait until the cluster has room for all roles."
    )
    start_timeout_s: PositiveFloat = Field(900.0, description="How long the roles may take to load their models.")
    call_timeout_s: PositiveFloat = Field(3600.0, description="How long any single call of a role may take.")


class ActorSettings(Settings):
    """How the processes of a role are placed."""

    replicas: PositiveInt = Field(1, description="Processes of this role. For a learner: data-parallel ranks.")
    threads: PositiveInt = Field(1, description="Compute threads of each process.")
    cpus: PositiveFloat = Field(
        0.25,
        description="Logical CPUs that Ray reserves for each process. Roles of a synchronous "
        "run take turns, so this may be lower than `threads`.",
    )
    gpus: NonNegativeFloat = Field(0.0, description="GPUs that Ray reserves for each process; 0 runs it on the CPU.")
    env: dict[str, str] = Field(default_factory=dict, description="Environment variables of each process.")

    @property
    def concurrent_calls(self) -> int:
        """Calls that one process works on at the same time."""
        return 1

    @property
    def kept_block_bytes(self) -> int:
        """Blocks up to this size keep their pages when they are freed (glibc). Otherwise every large tensor's pages are
        given back and faulted in again: a quarter of a training step on a CPU."""
        return 4 << 30


DType = Literal["auto", "float32", "bfloat16"]


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
        description="Attention kernel. `auto`: `flash_attention_2` on a GPU, `packed_sdpa` "
        "(exact, no cost for neighbours in the pack) on a CPU; else any name that transformers knows "
        "and that takes packed sequences.",
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


class ScorerSettings(ActorSettings):
    """How a reward model scores."""

    dtype: DType = Field("float32", description="Compute type.")
    max_length: PositiveInt | None = Field(
        None,
        description="Longest text in tokens; empty: what the model was trained with "
        "(its card), else its position limit.",
    )
    on_too_long: Literal["fail", "truncate"] = Field(
        "fail", description="A longer text is a failure with its cause, or is cut at the front and counted."
    )
    batch_size: PositiveInt = Field(64, description="Texts in one forward pass.")
    batch_tokens: PositiveInt | None = Field(
        None, description="Tokens of a forward pass, padding included. Empty: 4,096 on a CPU, 32,768 on GPUs."
    )
    batch_invariant: bool = Field(
        False,
        description="Score every text alone, so that its score is bit-for-bit the same whatever else is scored. Takes "
        "several times as long; without it scores differ by rounding. The gate's integrity checks always use it.",
    )

    @model_validator(mode="after")
    def _one_device(self) -> ScorerSettings:
        if self.gpus > 1:
            raise ValueError(f"gpus ({self.gpus:g}) must not be above 1: a scorer computes on one; replicas use others")
        return self


class RewardSettings(ScorerSettings):
    """The reward model that scores responses."""

    model: str = Field(
        description="Directory of a reward model (`rlhf-ray train-rm`), or of any "
        "`AutoModelForSequenceClassification` with one label. With `url`: name of the model in the service; empty "
        "lets the service choose."
    )
    url: str | None = Field(
        None,
        description="Reward service (`rlhf-ray serve-rm`) that scores in place of a model in this run, such as "
        "`http://10.0.0.7:8000`. What concerns the model itself is set there.",
    )
    token_file: str | None = Field(
        None,
        description="File with the service's bearer token, read where the run is started; empty: the environment "
        "variable `RLHF_RAY_TOKEN`, where it is set.",
    )
    timeout_s: PositiveFloat = Field(
        600.0,
        description="How long the service may take to score a shard. Until then what is lost or refused for overload "
        "is sent again; then it is an infrastructure failure.",
    )
    apply_temperature: bool = Field(
        False,
        description="Divide scores by the temperature in the model's card, so that σ of a difference is the calibrated "
        "probability that people prefer the one to the other.",
    )
    require_release: bool = Field(
        True,
        description="Refuse a model that the release gate refused (its card says so); one without a verdict is used.",
    )

    @model_validator(mode="before")
    @classmethod
    def _a_service_knows_its_model(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("url") is not None and values.get("model") is None:
            return {**values, "model": ""}
        return values

    @model_validator(mode="after")
    def _model_or_service(self) -> RewardSettings:
        if self.url is None:
            if not self.model:
                raise ValueError("model: it is empty; a directory, or url for the address of a reward service")
            return self
        place = urlsplit(self.url)
        if place.scheme not in ("http", "https") or not place.hostname:
            raise ValueError("url: a reward service's address begins with http:// or https:// and names a host")
        if "@" in place.netloc:
            # The configuration is kept in the run's folder.
            raise ValueError("url: it holds a token; put that into token_file or RLHF_RAY_TOKEN")
        for name in ("max_length", "batch_invariant", "gpus"):
            if vars(self)[name] != type(self).model_fields[name].default:
                raise ValueError(f"{name}: with url the model is the service's; set it there")
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
    enforce_eager: bool = Field(True, description="No CUDA graphs, no compilation. Turn off on GPUs for speed.")
    engine: dict[str, object] = Field(default_factory=dict, description="Further vLLM engine arguments, as they are.")

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

    prompts_per_step: PositiveInt = Field(16, description="Prompts of one step.")
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

    @model_validator(mode="after")
    def _shards_divide_the_step(self) -> SamplingSettings:
        if self.prompts_per_step % self.prompts_per_shard:
            raise ValueError(
                f"prompts_per_step ({self.prompts_per_step}) must be a multiple of prompts_per_shard "
                f"({self.prompts_per_shard})"
            )
        return self

    @property
    def num_shards(self) -> int:
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


class KLSettings(Settings):
    """The leash to the reference model."""

    coefficient: NonNegativeFloat = Field(
        0.05, description="β, weight of the KL penalty in nats (first value of the adaptive controller)."
    )
    estimator: Literal["k1", "k2", "k3"] = Field("k1", description="Per-token estimator of the KL divergence.")
    placement: Literal["reward", "loss"] = Field(
        "reward", description="Subtract β·KL from the reward of each token, or add it to the loss."
    )
    controller: Literal["fixed", "adaptive"] = Field(
        "fixed",
        description="`adaptive` moves β so that `kl/reference` "
        "stays near the target (Ziegler et al. 2019, section 2.2).",
    )
    target: PositiveFloat = Field(6.0, description="Target of the adaptive controller, nats a sequence.")
    horizon: PositiveInt = Field(10000, description="Samples over which the adaptive controller corrects.")
    stop_above: PositiveFloat | None = Field(
        None, description="End the run, keeping the policy, when `kl/reference` exceeds this many nats a sequence."
    )


class AlgorithmSettings(Settings):
    """Proximal policy optimisation and its relatives."""

    advantage: Literal["gae", "rloo", "grpo"] = Field(
        "gae",
        description="`gae` needs a critic; `rloo` (leave-one-out) and `grpo` (group-standardised) need at least two "
        "samples a prompt and no critic.",
    )
    gamma: Fraction = Field(1.0, description="Discount γ.")
    gae_lambda: Fraction = Field(0.95, description="GAE λ.")
    epochs: PositiveInt = Field(1, description="Passes over the samples of a step.")
    minibatches: PositiveInt = Field(1, description="Optimizer steps in each pass.")
    clip_low: PositiveFloat = Field(0.2, description="Ratio is clipped below 1 − this.")
    clip_high: PositiveFloat = Field(0.2, description="Ratio is clipped above 1 + this.")
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(
        None, description="Lower bound of the loss for negative advantages (Ye et al. 2020); empty: off."
    )
    value_clip: PositiveFloat | None = Field(
        None,
        description="Clip values to ± this around the old ones in the value loss; empty: off. It limits how far a "
        "critic moves in one step, whatever the scale of the rewards: one that starts at 0 then needs (return / "
        "clip) steps to reach the returns.",
    )
    critic_warmup_steps: NonNegativeInt = Field(
        0,
        description="First steps in which only the critic is trained. The policy is measured but not updated, so that "
        "its first updates do not follow the advantages of a critic that knows nothing.",
    )
    entropy_coefficient: NonNegativeFloat = Field(0.0, description="Weight of the entropy bonus.")
    reward_whiten: bool = Field(False, description="Standardise the scores of a step before shaping.")
    advantage_whiten: bool = Field(
        True, description="Standardise the advantages of a step over all its response tokens."
    )
    score_clip: PositiveFloat | None = Field(None, description="Clip scores to ± this; empty: off.")
    missing_eos_penalty: NonNegativeFloat = Field(
        0.0, description="Subtracted from the score of a response that did not end by itself."
    )
    loss_aggregation: Literal["token", "sequence"] = Field(
        "token",
        description="Mean over all tokens of the minibatch, or mean over its sequences of each one's token mean.",
    )
    old_logprobs: Literal["learner", "engine"] = Field(
        "learner",
        description="Denominator of the ratio: computed again by the learner before the first update (ratio is exactly "
        "1 at the start), or as the engine gave them (one forward pass less).",
    )
    importance_cap: PositiveFloat | None = Field(
        2.0,
        description="With `old_logprobs: learner`, truncated importance weight for "
        "the mismatch between engine and learner (Yao et al. 2025); empty: off.",
    )
    kl: KLSettings = Field(default_factory=KLSettings, description="The leash to the reference model.")

    @property
    def asks_old_logprobs(self) -> bool:
        """Whether the policy learner computes its log-probs before it trains.

        With one update a step its training pass computes the same; only a KL penalty in the reward needs them earlier.
        """
        one_update = self.epochs == 1 and self.minibatches == 1
        kl_in_reward = self.kl.placement == "reward" and self.kl.coefficient > 0
        return self.old_logprobs == "learner" and (kl_in_reward or not one_update)


class WeightSettings(Settings):
    """How new weights reach the engine."""

    transport: Literal["object_store", "nccl"] = Field(
        "object_store",
        description="`object_store` works everywhere; `nccl` is "
        "vLLM's own engine for learners and generators on separate GPUs.",
    )
    bucket_mib: PositiveInt = Field(64, description="Size of one bucket of weights.")
    probe_tokens: PositiveInt = Field(
        64,
        description="Prompt tokens on which engine and learner are compared after every sync: they must agree, and "
        "the engine's log-probs must have changed as the learner's have.",
    )
    max_abs_dlogp_float32: PositiveFloat = Field(
        1e-4, description="Largest |Δ log-prob| allowed when engine and learner compute in float32."
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


class CheckpointSettings(Settings):
    """Checkpointing."""

    every_steps: PositiveInt = Field(10, description="A checkpoint every n steps (and at a stop).")
    keep: PositiveInt = Field(2, description="Newest checkpoints kept.")


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
    critic: CriticSettings | None = Field(None, description="The critic; only with `algorithm.advantage: gae`.")
    reference: ReferenceSettings | None = Field(
        default_factory=ReferenceSettings, description="The reference; null only when `algorithm.kl.coefficient` is 0."
    )
    reward: RewardSettings = Field(description="The reward model.")
    generator: GeneratorSettings = Field(default_factory=GeneratorSettings, description="The engine.")
    sampling: SamplingSettings = Field(default_factory=SamplingSettings, description="How much is sampled, and how.")
    algorithm: AlgorithmSettings = Field(default_factory=AlgorithmSettings, description="The algorithm.")
    weights: WeightSettings = Field(default_factory=WeightSettings, description="How new weights reach the engine.")
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings, description="Held-out judgement.")
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings, description="Checkpointing.")

    @model_validator(mode="after")
    def _roles_fit_the_algorithm(self) -> PPOConfig:
        algorithm, sampling = self.algorithm, self.sampling
        if algorithm.advantage == "gae" and self.critic is None:
            raise ValueError(
                "critic: algorithm.advantage is 'gae', which needs a critic section; use 'rloo' or 'grpo' without"
            )
        if algorithm.advantage != "gae" and self.critic is not None:
            raise ValueError(
                f"critic: algorithm.advantage is '{algorithm.advantage}', which has no critic; remove the section"
            )
        if algorithm.advantage != "gae" and algorithm.critic_warmup_steps:
            raise ValueError(f"algorithm.critic_warmup_steps: '{algorithm.advantage}' has no critic to warm up")
        if algorithm.advantage != "gae" and sampling.samples_per_prompt < 2:
            raise ValueError(
                f"sampling.samples_per_prompt: '{algorithm.advantage}' compares the samples of a prompt; at least 2"
            )
        if algorithm.kl.placement == "loss" and algorithm.kl.estimator == "k1":
            raise ValueError("algorithm.kl.estimator: 'k1' in the loss has no gradient on average; use 'k2' or 'k3'")
        if algorithm.kl.controller == "adaptive" and (algorithm.kl.coefficient == 0 or self.reference is None):
            raise ValueError(
                "algorithm.kl.controller: 'adaptive' multiplies the coefficient, which must start above 0, and needs "
                "a reference section"
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
        if self.weights.transport == "nccl" and (self.generator.gpus == 0 or self.policy.learner.gpus == 0):
            raise ValueError(
                "weights.transport: 'nccl' needs generator.gpus and policy.learner.gpus above 0; use 'object_store'"
            )
        return self


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
        default_factory=lambda: CheckpointSettings(every_steps=50, keep=1), description="Checkpointing."
    )
