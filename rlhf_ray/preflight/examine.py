"""All checks of a configuration, in the order in which a run would fall over what they find."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rlhf_ray.config.reward_model import RewardModelConfig
from rlhf_ray.config.settings import PPOConfig, SFTConfig
from rlhf_ray.data.prompts import PromptSet
from rlhf_ray.data.text import load_text
from rlhf_ray.models.policy import PolicyFacts, read_policy
from rlhf_ray.ppo.inputs import check_critic, check_reference, context_tokens, read_prompts, source_keys
from rlhf_ray.ppo.object_store import check_object_store, rollout_bytes, snapshot_bytes
from rlhf_ray.ppo.roles import role_requests
from rlhf_ray.ppo.state import check_resumable
from rlhf_ray.preflight.findings import Findings, State, size_text
from rlhf_ray.preflight.needs import Need, ppo_needs, reward_model_needs, sft_needs
from rlhf_ray.preflight.nodes import (
    NodeReport,
    check_paths,
    check_versions,
    look,
    look_everywhere,
    own_versions,
    this_machine,
    with_memory,
)
from rlhf_ray.preflight.outside import check_secrets, check_working_directory
from rlhf_ray.preflight.room import check_disk, check_gpu_memory, check_kv_cache, check_node_memory
from rlhf_ray.reward.core.source import RewardSource
from rlhf_ray.reward.judge.inputs import read_training_inputs
from rlhf_ray.reward.judge.judging import check_vllm, integrity_requests, scorer_request
from rlhf_ray.runtime.cluster import (
    NodeShape,
    RoleRequest,
    check_resources,
    cluster_address,
    cluster_nodes,
    connect,
    disconnect,
)
from rlhf_ray.tracking.run_copy import RunCopy
from rlhf_ray.tracking.run_folder import RunFolder
from rlhf_ray.tracking.tracker import check_folder, run_folder_path

TrainingConfig = PPOConfig | SFTConfig | RewardModelConfig
NodeCheck = Callable[[Sequence[NodeShape]], None]


@dataclass(frozen=True)
class Subject:
    """What a command will need, as far as it is known.

    Attributes:
        phases: roles that are there at the same time.
        paths: keys of the models and data, by path.
        node_checks: what else the nodes must satisfy.
        prompts: to train on.
    """

    phases: list[list[Need]]
    paths: Mapping[str, str]
    node_checks: list[NodeCheck] = field(default_factory=list)
    prompts: PromptSet | None = None


@dataclass(frozen=True)
class Site:
    """Where it will run.

    Attributes:
        reports: of each node; none where nodes are only described.
    """

    nodes: Sequence[NodeShape]
    reports: Sequence[NodeReport] = ()


def examine(config: TrainingConfig, findings: Findings, resume: bool = False, site: Site | None = None) -> list[Need]:
    """Check everything.

    Args:
        resume: the run is to be resumed.
        site: None: this machine, or the cluster that the configuration names.

    Returns:
        What each role needs.
    """
    findings.check("run folder", partial(check_folder, config, resume), lambda _: run_folder_path(config))
    if config.checkpoint.copy_to is not None:
        findings.check("checkpoint.copy_to", partial(_check_copy, config, resume), str)
    subject = _subject(config, findings)
    folder = RunFolder(Path(run_folder_path(config)))
    if resume and isinstance(config, PPOConfig) and subject.prompts is not None:
        findings.check("checkpoint", partial(check_resumable, config, subject.prompts, folder))
    site = site or survey(config, findings, subject.paths)
    if site is not None:
        _check_nodes(config, findings, subject, site, folder)
    check_working_directory(findings, Path.cwd(), cluster_address(config.cluster) is not None)
    check_secrets(findings, config)
    return [need for phase in subject.phases for need in phase]


def survey(config: TrainingConfig, findings: Findings, paths: Mapping[str, str]) -> Site | None:
    """See what the nodes are like; None where there is no such cluster."""
    readable, runs = tuple(paths), config.paths.runs
    if cluster_address(config.cluster) is None:
        machine = this_machine(config.cluster)
        return Site([machine], [look(machine.address, readable, runs)])

    def ask() -> Site:
        connect(config.cluster)
        try:
            reports = look_everywhere(findings, readable, runs)
            return Site(with_memory(cluster_nodes(), reports), reports)
        finally:
            disconnect()

    return findings.check("cluster.address", ask)


def _check_copy(config: TrainingConfig, resume: bool) -> str:
    copy = RunCopy(config.checkpoint, config.run.name)
    copy.check(resume)
    return copy.url


def _check_nodes(config: TrainingConfig, findings: Findings, subject: Subject, site: Site, folder: RunFolder) -> None:
    nodes, reports = site.nodes, site.reports
    for phase in subject.phases:
        requests = [need.request for need in phase]
        findings.check("resources", partial(check_resources, requests, nodes), partial(_name, _asked(requests, nodes)))
    check_versions(findings, reports, own_versions())
    check_paths(findings, reports, subject.paths, config.paths.runs)
    unknown = [need.request.role for phase in subject.phases for need in phase if need.memory is None]
    if unknown:
        findings.unknown("memory", f"not computed for {', '.join(unknown)}: the model is not readable here")
    known = [[need for need in phase if need.memory is not None] for phase in subject.phases]
    check_node_memory(findings, known, nodes, config.cluster.placement_strategy)
    for phase in known:
        check_gpu_memory(findings, phase, nodes)
    for check in subject.node_checks:
        check(nodes)
    free = {report.address: report.free_disk_bytes for report in reports}
    there = len(folder.complete_checkpoints())
    check_disk(findings, [need for phase in subject.phases for need in phase], config.checkpoint, free, there)


def _subject(config: TrainingConfig, findings: Findings) -> Subject:
    if isinstance(config, PPOConfig):
        return _ppo(config, findings)
    if isinstance(config, SFTConfig):
        return _sft(config, findings)
    return _reward_model(config, findings)


def _ppo(config: PPOConfig, findings: Findings) -> Subject:
    policy = findings.check("policy.model", partial(read_policy, config.policy), describe_policy)
    sources = [
        findings.check(key, partial(RewardSource.read, source, key), describe_source)
        for source, key in zip(config.reward, source_keys(config), strict=True)
    ]
    rewards = [source for source in sources if source is not None]
    held_out = config.evaluation.prompts
    prompts = {"prompts.path": config.prompts} | ({"evaluation.prompts.path": held_out} if held_out else {})
    models = {"policy.model": config.policy.model}
    models |= {f"{key}.model": source.model for source, key in zip(config.reward, source_keys(config), strict=True)}
    if config.reference_role is not None and config.reference_role.model is not None:
        models["reference.model"] = config.reference_role.model
    if config.critic is not None and config.critic.model is not None:
        models["critic.model"] = config.critic.model
    paths = _local(models | {key: settings.path for key, settings in prompts.items()})
    if policy is None:
        for key in prompts:
            findings.unknown(key, "not read: that takes the policy's tokenizer")
        return Subject([[Need(request, None) for request in role_requests(config)]], paths)
    for key, check in (("reference.model", check_reference), ("critic.model", check_critic)):
        findings.check(key, partial(check, config, policy), partial(_name, models[key]) if key in models else None)
    found: dict[str, PromptSet | None] = {}
    for key, settings in prompts.items():
        read = partial(read_prompts, config, policy, settings, key, rewards)
        found[key] = findings.check(key, read, lambda read: f"{len(read)} prompts, {read.num_skipped} rows left out")
    check_kv_cache(findings, config.generator, policy.size, context_tokens(config, policy))
    unread = {finding.what for finding in findings.found if finding.state is not State.OK}
    needs = ppo_needs(config, policy, rewards, unread)

    def store(nodes: Sequence[NodeShape]) -> None:
        check = partial(check_object_store, config, policy.size, nodes)
        findings.check("object store", check, lambda _: _describe_store(config, policy))

    return Subject([needs], paths, [store], found["prompts.path"])


def _sft(config: SFTConfig, findings: Findings) -> Subject:
    paths = _local({"policy.model": config.policy.model, "text.path": config.text.path})
    policy = findings.check("policy.model", partial(read_policy, config.policy), describe_policy)
    if policy is None:
        findings.unknown("text.path", "not read: that takes the policy's tokenizer")
        return Subject([[Need(RoleRequest("policy", "policy.learner", config.policy.learner), None)]], paths)
    text = partial(load_text, config.text, policy.tokenizer, policy.facts.context_tokens)
    findings.check("text.path", text, lambda read: f"{len(read.examples)} rows, {read.num_skipped} left out")
    return Subject([sft_needs(config, policy)], paths)


def _reward_model(config: RewardModelConfig, findings: Findings) -> Subject:
    data = {"pairs.path": config.pairs, "validation.path": config.validation, "held_out.path": config.held_out}
    paths = _local({"model": config.model} | {key: each.path for key, each in data.items() if each is not None})
    if config.gate.enabled and config.held_out is not None:
        findings.check("gate.vllm", partial(check_vllm, config.gate))
    read = partial(read_training_inputs, config)
    inputs = findings.check("model", read, lambda read: f"{config.model}: {len(read.training.pairs)} pairs")
    if inputs is not None:
        return Subject(reward_model_needs(config), paths)
    learner = RoleRequest("reward-learner", "learner", config.learner)
    phases = [[learner], [scorer_request(config.scorer)], integrity_requests(config.scorer, config.gate)]
    return Subject([[Need(request, None) for request in phase] for phase in phases], paths)


def _name(name: str, _: object) -> str:
    return name


def _asked(requests: Sequence[RoleRequest], nodes: Sequence[NodeShape]) -> str:
    """What roles ask for, of what there is."""
    cpus = sum(each.settings.replicas * each.settings.cpus for each in requests)
    gpus = sum(each.settings.replicas * each.settings.gpus for each in requests if each.shares_gpus_of is None)
    there = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    roles = ", ".join(each.role for each in requests)
    return f"{cpus:g} of {there[0]:g} CPUs and {gpus:g} of {there[1]:g} GPUs on {len(nodes)} node(s) for {roles}"


def describe_policy(policy: PolicyFacts) -> str:
    """In a line."""
    template = "a chat template" if policy.tokenizer.chat_template else "no chat template"
    size = policy.size
    trained = "" if size.trained == size.parameters else f", {size.trained / 1e6:.1f} M of them trained"
    return f"{policy.settings.model}: {size.parameters / 1e6:.1f} M parameters{trained}; tokenizer with {template}"


def describe_source(source: RewardSource) -> str:
    """In a line."""
    settings = source.settings
    if source.texts is None:
        return f"{settings.function or settings.url}"
    verdict = {None: "not judged", True: "released", False: "refused by the gate, used all the same"}
    return f"{settings.model}: {verdict[source.card.released if source.card else None]}"


def _describe_store(config: PPOConfig, policy: PolicyFacts) -> str:
    snapshots, rollouts = snapshot_bytes(config, policy.size), rollout_bytes(config, policy.size)
    versions = f"{config.algorithm.max_staleness + 1} version(s) of the weights take {size_text(snapshots)}"
    return f"{versions if snapshots else 'weights are broadcast'}, rollouts {size_text(rollouts)}"


def _local(keys: Mapping[str, str]) -> dict[str, str]:
    """Keys of what is a path here, by path; names on a hub are none."""
    return {path: key for key, path in keys.items() if path and Path(path).exists()}
