"""What the processes of a command need: which there are, how much memory each takes, how large its checkpoints are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from rlhf_ray.config.reward_model import RewardModelConfig
from rlhf_ray.config.settings import LearnerSettings, PPOConfig, SFTConfig
from rlhf_ray.models.loading import resolve_dtype
from rlhf_ray.models.policy import PolicyFacts
from rlhf_ray.models.sizes import ITEM_BYTES, ModelSize, read_model_size
from rlhf_ray.ppo.inputs import context_tokens
from rlhf_ray.ppo.object_store import snapshot_bytes
from rlhf_ray.ppo.roles import role_requests
from rlhf_ray.preflight.memory import (
    Memory,
    Pass,
    generator_memory,
    learner_memory,
    process_memory,
    reference_memory,
    scorer_memory,
)
from rlhf_ray.reward.core.source import RewardSource
from rlhf_ray.reward.judge.judging import integrity_requests, scorer_request
from rlhf_ray.roles.deepspeed_engine import deepspeed_configuration
from rlhf_ray.runtime.cluster import RoleRequest


@dataclass(frozen=True)
class Need:
    """A role, and what each of its processes needs.

    Attributes:
        memory: None where the role's model cannot be read here.
        checkpoint: bytes that a group of learners keeps in one.
        exported: bytes of the models that are written of it.
    """

    request: RoleRequest
    memory: Memory | None
    checkpoint: float = 0.0
    exported: float = 0.0

    def of_learner(self, settings: LearnerSettings, size: ModelSize, exports: int = 0) -> Need:
        """The same with what is written of a learner.

        DeepSpeed keeps the weights as they are computed with, two float32 moments, and a float32 copy of what is
        trained where ZeRO has one.

        Args:
            exports: directories that are written of the model.
        """
        dtype = resolve_dtype(settings.dtype, settings.gpus > 0)
        zero = deepspeed_configuration(settings, dtype, settings.replicas)["zero_optimization"]
        weights = ITEM_BYTES[dtype] * size.parameters
        checkpoint = weights + (12 if zero["stage"] else 8) * size.trained
        return replace(self, checkpoint=float(checkpoint), exported=float(exports * weights))


def ppo_needs(
    config: PPOConfig, policy: PolicyFacts, rewards: Sequence[RewardSource], unread: Collection[str]
) -> list[Need]:
    """All roles of a PPO run, which are there at the same time.

    Args:
        rewards: sources that could be read.
        unread: keys of models that could not.
    """
    sampling, algorithm, size = config.sampling, config.algorithm, policy.size
    samples = sampling.prompts_per_step * sampling.samples_per_prompt
    lengths = sampling.max_prompt_tokens, sampling.max_response_tokens

    def minibatch(learner: LearnerSettings) -> Pass:
        return Pass.of(learner.micro_batch_tokens, samples // learner.replicas // algorithm.minibatches, *lengths)

    learner, snapshots = config.policy.learner, snapshot_bytes(config, size)
    # A page of a snapshot is mapped by the rank that wrote it and by the engines that read it: each has its share.
    mapped = snapshots / (1 + config.generator.replicas)
    published = snapshots / (algorithm.max_staleness + 1)
    trained = learner_memory(learner, size, minibatch(learner), has_entropy=algorithm.entropy_coefficient > 0)
    engine = generator_memory(config.generator, size, context_tokens(config, policy), published)
    memories = {
        "generator": replace(engine, host={**engine.host, "object store": mapped}),
        "policy.learner": replace(trained, first=trained.first + mapped),
        "evaluation": process_memory(),
        **{source.key: source_memory(source) for source in rewards},
    }
    if config.reference_role is not None and "reference.model" not in unread:
        own = config.reference_role.model
        memories["reference"] = reference_memory(
            config.reference_role,
            size if own is None else read_model_size(own),
            Pass.of(
                config.reference_role.micro_batch_tokens,
                sampling.prompts_per_shard * sampling.samples_per_prompt,
                *lengths,
            ),
        )
    needs = {request.key: Need(request, memories.get(request.key)) for request in role_requests(config)}
    exports = 2 if config.evaluation.keep_best else 1
    needs["policy.learner"] = needs["policy.learner"].of_learner(learner, size, exports)
    if config.critic is not None and "critic.model" not in unread:
        key, learner = "critic.learner", config.critic.learner
        backbone, trained_layers = config.critic.model or config.policy.model, learner.trainable_top_layers
        critic = read_model_size(backbone, head="none", trained_top_layers=trained_layers)
        memory = learner_memory(learner, critic, minibatch(learner), has_head=False)
        needs[key] = replace(needs[key], memory=memory).of_learner(learner, critic)
    return list(needs.values())


def source_memory(source: RewardSource) -> Memory:
    """A scorer; those of services and functions hold no model."""
    if source.texts is None:
        return process_memory()
    size = read_model_size(source.settings.model, head="SequenceClassification")
    return scorer_memory(source.settings, size, len(source.texts.folders))


def sft_needs(config: SFTConfig, policy: PolicyFacts) -> list[Need]:
    """The learner."""
    learner = config.policy.learner
    work = Pass.of(learner.micro_batch_tokens, config.batch_size // learner.replicas, 0, config.text.max_tokens)
    need = Need(RoleRequest("policy", "policy.learner", learner), learner_memory(learner, policy.size, work))
    return [need.of_learner(learner, policy.size, exports=1)]


def reward_model_needs(config: RewardModelConfig) -> list[list[Need]]:
    """The learner, the scorers, and those who check the result: one after the other."""
    learner, training = config.learner, config.training
    size = read_model_size(
        config.model,
        head="SequenceClassification",
        trained_top_layers=learner.trainable_top_layers,
        lora=training.lora,
    )
    work = Pass.of(learner.micro_batch_tokens, 2 * training.batch_size // learner.replicas, 0, training.max_length)
    memory = learner_memory(learner, size, work, has_head=False)
    trained = Need(RoleRequest("reward-learner", "learner", learner), memory)
    trained = trained.of_learner(learner, size, config.ensemble.num_models)
    scored = scorer_memory(config.scorer, size, config.ensemble.num_models)
    # The checks compute in float32, one of them in an engine.
    checked = scorer_memory(config.scorer.model_copy(update={"dtype": "float32"}), size, config.ensemble.num_models)
    checks = integrity_requests(config.scorer, config.gate) if config.gate.enabled else []
    phases = [[trained], [Need(scorer_request(config.scorer), scored)], [Need(each, checked) for each in checks]]
    return [phase for phase in phases if phase]
