"""What preflight finds: planted faults, each named by its key, and nothing in the configurations that are shipped.

Nodes are described as data; no actor is started.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, LlamaConfig, Qwen2Config

from rlhf_ray.config.base import ActorSettings
from rlhf_ray.config.load import load_config
from rlhf_ray.config.settings import CheckpointSettings, PPOConfig
from rlhf_ray.failures import BadInput
from rlhf_ray.models.loading import resolve_attention
from rlhf_ray.models.packing import pack
from rlhf_ray.models.policy import read_policy
from rlhf_ray.models.sizes import ITEM_BYTES, read_model_size
from rlhf_ray.models.token_models import load_policy_model
from rlhf_ray.ppo.object_store import check_object_store, rollout_bytes, snapshot_bytes
from rlhf_ray.preflight.command import preflight, run_preflight
from rlhf_ray.preflight.examine import Site
from rlhf_ray.preflight.findings import Findings, State
from rlhf_ray.preflight.memory import Pass, kept_activations
from rlhf_ray.preflight.needs import Need, ppo_needs
from rlhf_ray.preflight.nodes import NodeReport, look, own_versions
from rlhf_ray.preflight.outside import working_directory_bytes
from rlhf_ray.preflight.room import check_disk, place
from rlhf_ray.reward.core.card import RewardModelCard
from rlhf_ray.reward.core.source import RewardSource
from rlhf_ray.runtime.cluster import NodeShape, RoleRequest
from tests.conftest import REPOSITORY
from tests.planting import edit_json, edit_tokenizer

CONFIGS = REPOSITORY / "configs"
GIB = 1 << 30
LAPTOP = NodeShape("laptop", cpus=2, gpus=0, object_store_bytes=GIB, memory_bytes=24 * GIB)
GPU_NODE = NodeShape(
    "gpu-node", cpus=96, gpus=8, object_store_bytes=200 * GIB, memory_bytes=1024 * GIB, gpu_memory_bytes=80 * 10**9
)
SOUND = NodeReport(
    "laptop",
    versions=own_versions(),
    memory_bytes=LAPTOP.memory_bytes,
    gpu_memory_bytes=0,
    unreadable=(),
    unwritable="",
    free_disk_bytes=100 * 10**9,
)


def site_of(node: NodeShape = LAPTOP, count: int = 1, **report: Any) -> Site:
    """Nodes that are alike."""
    nodes = [replace(node, address=f"{node.address}-{number}") for number in range(count)]
    reports = [
        replace(SOUND, **{"address": each.address, "memory_bytes": each.memory_bytes, **report}) for each in nodes
    ]
    return Site(nodes, reports)


def preflight_of(config: Path, overrides: list[str], site: Site | None) -> Findings:
    findings = Findings()
    preflight(config, overrides, findings, site=site)
    return findings


@dataclass(frozen=True)
class Workplace:
    """Copies of the tiny models and data, which may be damaged.

    Attributes:
        folder: with `data` and `runs` in it.
    """

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data" / "tiny"

    @property
    def policy(self) -> Path:
        return self.data / "policy"

    @property
    def reward_model(self) -> Path:
        return self.data / "reward_model"

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "tiny-ppo"

    def overrides(self) -> list[str]:
        return [f"paths.data={self.folder}/data", f"paths.runs={self.folder}/runs"]

    def rows(self, *rows: Any) -> list[str]:
        """Prompts of one's own."""
        path = self.folder / "rows.jsonl"
        path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), "utf-8")
        return [f"prompts.path={path}"]


@pytest.fixture
def workplace(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    shutil.copytree(tiny, tmp_path / "data" / "tiny")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Workplace(tmp_path)


Plant = Callable[[Workplace], list[str]]
"""Damages something, or gives overrides that ask for what cannot be."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        what: the key or the place that is named.
        said: a part of what is said of it.
    """

    what: str
    said: str
    plant: Plant
    site: Site | None = field(default_factory=site_of)
    config: str = "tiny/ppo.yaml"


def settings(*overrides: str) -> Plant:
    return lambda workplace: list(overrides)


def damage(action: Callable[[Workplace], object]) -> Plant:
    def plant(workplace: Workplace) -> list[str]:
        action(workplace)
        return []

    return plant


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def without_chat_template(workplace: Workplace) -> list[str]:
    (workplace.policy / "chat_template.jinja").unlink()
    return workplace.rows({"prompt": [{"role": "user", "content": "Hello"}]})


def refused_by_the_gate(workplace: Workplace) -> None:
    card = RewardModelCard(
        version="v1",
        base_model="none",
        max_length=128,
        append_eos=True,
        chat_template=None,
        training_data="hash",
        released=False,
        refusals=("accuracy",),
    )
    card.save(workplace.reward_model)


def finished(workplace: Workplace) -> None:
    workplace.run.mkdir(parents=True)
    (workplace.run / "summary.json").write_text("{}")


def large_folder(workplace: Workplace) -> list[str]:
    with Path("weights.bin").open("wb") as file:
        file.truncate(600 << 20)
    return ["cluster.address=10.0.0.1:6379"]


def moved(workplace: Workplace) -> None:
    workplace.policy.rename(workplace.data / "elsewhere")


def smaller_critic(workplace: Workplace) -> list[str]:
    shutil.copytree(workplace.policy, workplace.data / "critic")
    edit_json(workplace.data / "critic" / "config.json", vocab_size=100)
    return [f"critic.model={workplace.data}/critic"]


def without_ray() -> dict[str, str]:
    return {name: number for name, number in own_versions().items() if name != "ray"}


def tiny(name: str) -> Plant:
    return lambda workplace: [f"policy.model={workplace.data}/{name}"]


NO_MODEL = ("reward.model=null", "reward.max_length=null")
MANY_SAMPLES = ("sampling.prompts_per_step=65536", "sampling.samples_per_prompt=64")
FAULTS: dict[str, Fault] = {
    # The file itself.
    "unknown key": Fault(
        "override", "unknown key 'policy.learner.learnig_rate'", settings("policy.learner.learnig_rate=1")
    ),
    "keys that contradict": Fault("configs/tiny", "in_flight_updates", settings("algorithm.in_flight_updates=true")),
    "finished run": Fault("{folder}/runs/tiny-ppo", "finished run", damage(finished)),
    # Models and tokenizers.
    "no such file system": Fault("checkpoint.copy_to", "Protocol not known", settings("checkpoint.copy_to=far://away")),
    "no policy": Fault("policy.model", "there is no directory", damage(moved)),
    "no weights": Fault("policy.model", "no weights", damage(lambda w: (w.policy / "model.safetensors").unlink())),
    "pickle": Fault("policy.model", "pytorch_model.bin", damage(lambda w: pickled(w.policy))),
    "cut weights": Fault("policy.model", "cut short", damage(lambda w: truncated(w.policy / "model.safetensors"))),
    "broken config": Fault("policy.model", "cannot be read", damage(lambda w: truncated(w.policy / "config.json"))),
    "no tokenizer": Fault(
        "policy.model",
        "no readable tokenizer",
        damage(lambda w: [(w.policy / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")]),
    ),
    "no end of sequence": Fault(
        "policy.model", "no end-of-sequence token", damage(lambda w: edit_tokenizer(w.policy, eos_token=None))
    ),
    "foreign tokenizer": Fault(
        "policy.model", "does not fit", damage(lambda w: edit_json(w.policy / "config.json", vocab_size=100))
    ),
    "policy is a classifier": Fault("policy.model", "SequenceClassification", tiny("reward_model")),
    "too many top layers": Fault(
        "policy.learner.trainable_top_layers", "3 layers", settings("policy.learner.trainable_top_layers=3")
    ),
    "no such attention": Fault(
        "policy.learner.attention", "'flash_attention'", settings("policy.learner.attention=flash_attention")
    ),
    "a kernel that is not installed": Fault(
        "reference.attention", "needs the package", settings("reference.attention=flash_attention_2")
    ),
    "a kernel from a hub": Fault(
        "critic.learner.attention", "no attention is called", settings("critic.learner.attention=kernels-community/fa2")
    ),
    "no such adapter": Fault(
        "policy.lora.target_modules",
        "no_proj",
        settings("policy.lora.target_modules=[no_proj]", "reference.dtype=auto"),
    ),
    "no reference": Fault("reference.model", "there is no directory", settings("reference.model=/no/such/model")),
    "foreign critic": Fault("critic.model", "does not fit", smaller_critic),
    "critic's top layers": Fault(
        "critic.learner.trainable_top_layers", "9 layers", settings("critic.learner.trainable_top_layers=9")
    ),
    # Rewards.
    "no reward model": Fault("reward.model", "there is no directory", settings("reward.model=/no/such/model")),
    "pickled reward model": Fault("reward.model", "pytorch_model.bin", damage(lambda w: pickled(w.reward_model))),
    "reward is no classifier": Fault("reward.model", "scoring head", lambda w: [f"reward.model={w.policy}"]),
    "refused reward model": Fault("reward.model", "release gate", damage(refused_by_the_gate)),
    "too long for the reward model": Fault("reward.max_length", "4096 tokens", settings("reward.max_length=4096")),
    "no reward function": Fault(
        "reward.function", "no_such_module", settings(*NO_MODEL, "reward.function=no_such_module:score")
    ),
    "no reward service": Fault(
        "reward.url", "does not answer", settings(*NO_MODEL, "reward.url=http://127.0.0.1:1", "reward.timeout_s=1")
    ),
    # Data.
    "no prompts": Fault("prompts.path", "does not exist", settings("prompts.path=/no/such.jsonl")),
    "bad row": Fault("{folder}/rows.jsonl:2", "is not JSON", lambda w: w.rows({"prompt": "I think"}, "{")),
    "long prompt": Fault("{folder}/rows.jsonl:1", "300 tokens", lambda w: w.rows({"prompt": "I think " * 100})),
    "no chat template": Fault("{folder}/rows.jsonl:1", "chat template", without_chat_template),
    "no held-out prompts": Fault(
        "evaluation.prompts.path", "does not exist", settings("evaluation.prompts.path=/no/such.jsonl")
    ),
    # Room.
    "too many CPUs": Fault("policy.learner.cpus", "policy.learner 3", settings("policy.learner.cpus=3")),
    "no GPUs": Fault("reward.gpus", "the cluster has 0", settings("reward.gpus=1")),
    "too many threads": Fault("policy.learner.threads", "16 threads", settings("policy.learner.threads=16")),
    "too little memory": Fault(
        "generator", "memory of laptop-0", settings(), site_of(replace(LAPTOP, memory_bytes=GIB))
    ),
    "KV cache too small": Fault("generator.kv_cache_gib", "0 sequence(s)", settings("generator.kv_cache_gib=0.00001")),
    "object store too small": Fault(
        "cluster.object_store_gib",
        "3 version(s)",
        settings("algorithm.max_staleness=2"),
        site_of(replace(LAPTOP, object_store_bytes=1 << 20)),
    ),
    "too many rollouts": Fault("cluster.object_store_gib", "rollouts", settings(*MANY_SAMPLES)),
    "disk too small": Fault(
        "checkpoint.keep", "3 + 1 checkpoints", settings("checkpoint.keep=3"), site_of(free_disk_bytes=10**6)
    ),
    # Nodes.
    "no cluster": Fault("cluster.address", "no Ray cluster answers", settings("cluster.address=127.0.0.1:1"), None),
    "another version": Fault(
        "node laptop-0: torch", "1.0", settings(), site_of(versions={**own_versions(), "torch": "1.0"})
    ),
    "no such package": Fault(
        "node laptop-0: ray",
        "none",
        settings(),
        site_of(versions=without_ray()),
    ),
    "folder that is not shared": Fault(
        "paths.runs", "not the folder", settings(), site_of(unwritable="it is not the folder")
    ),
    # What leaves the machine.
    "large working directory": Fault("working directory", "600.0 MiB", large_folder),
    "token by its name": Fault("policy.learner.env", "secret", settings("policy.learner.env.HF_TOKEN=abc")),
    "key by its look": Fault("reward.env.HUB", "secret", settings("reward.env.HUB=hf_abcdefghijklmnopqrstuv")),
    "password in an address": Fault(
        "generator.env.PROXY", "secret", settings("generator.env.PROXY=http://me:pass@host")
    ),
    # Other commands.
    "no text": Fault("text.path", "does not exist", settings("text.path=/no/text.jsonl"), config="demo/sft.yaml"),
    "no pairs": Fault(
        "pairs.path", "does not exist", settings("pairs.path=/no/pairs.jsonl"), config="tiny/reward_model.yaml"
    ),
    "too long for the backbone": Fault(
        "training.max_length", "9999 tokens", settings("training.max_length=9999"), config="tiny/reward_model.yaml"
    ),
}


@pytest.fixture(scope="module")
def shapes(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories with the configurations of the models that the shipped runs name, and next to nothing as weights.

    Their tokenizer is the tiny one, and `rows.jsonl` has what any of the commands reads.
    """
    folder = tmp_path_factory.mktemp("shapes")
    qwen = {"vocab_size": 152_064, "tie_word_embeddings": False, "num_key_value_heads": 8, "head_dim": 128}
    sizes = {
        "smollm2": LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=49_152,
            tie_word_embeddings=True,
        ),
        "minilm": BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, vocab_size=30_522),
        "1.5b": Qwen2Config(**SHAPE_1_5B),
        "7b": Qwen2Config(**{**qwen, "num_key_value_heads": 4}, **SHAPE_7B),
        "32b": Qwen2Config(**qwen, **SHAPE_32B),
        "72b": Qwen2Config(**qwen, **SHAPE_72B),
    }
    for name, config in sizes.items():
        for kind in ("", "-rm"):
            shutil.copytree(data_root / "tiny" / "policy", folder / f"{name}{kind}")
            config.architectures = ["Qwen2ForSequenceClassification" if kind else "Qwen2ForCausalLM"]
            config.num_labels, config.pad_token_id = 1 if kind else 2, 0
            config.save_pretrained(folder / f"{name}{kind}")
    row = {"prompt": "I think", "chosen": " good", "rejected": " bad", "response": " good", "gap": 2.0}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    return folder


SHAPE_1_5B = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
SHAPE_7B = {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28}
SHAPE_32B = {"hidden_size": 5120, "intermediate_size": 27_648, "num_hidden_layers": 64, "num_attention_heads": 40}
SHAPE_72B = {"hidden_size": 8192, "intermediate_size": 29_568, "num_hidden_layers": 80, "num_attention_heads": 64}


@dataclass(frozen=True)
class Shipped:
    """A configuration of the project and a place like the one that it is for.

    Attributes:
        model: shape of the policy or the backbone.
        critic, reward: shapes of theirs, where they are another model's.
        more: what a test machine need not have, replaced.
    """

    model: str
    nodes: int = 1
    critic: str = ""
    reward: str = ""
    more: tuple[str, ...] = ()

    def overrides(self, config: str, shapes: Path, runs: Path) -> list[str]:
        """The stand-ins, in place of what the configuration names."""
        text = (CONFIGS / config).read_text("utf-8")
        rows, chosen = shapes / "rows.jsonl", [f"paths.runs={runs}", *self.more]
        named = {
            "policy.model": (shapes / self.model) if "\npolicy:" in text else None,
            "model": (shapes / self.model) if "\nmodel:" in text else None,
            "critic.model": (shapes / self.critic) if self.critic else None,
            "reward.model": (shapes / f"{self.reward}-rm") if self.reward else None,
        }
        chosen += [f"{key}={path}" for key, path in named.items() if path is not None]
        for key in ("prompts", "evaluation.prompts", "text", "pairs", "held_out"):
            if f"\n{key.partition('.')[0]}:" in text:
                chosen += [f"{key}.path={rows}", f"{key}.split=null"]
        return chosen


SHIPPED = {
    "demo/sft.yaml": Shipped("smollm2"),
    "demo/reward_model.yaml": Shipped("minilm"),
    "demo/ppo.yaml": Shipped("smollm2", reward="minilm"),
    "verifiable/ppo.yaml": Shipped("smollm2", more=("reward.function=rlhf_ray.reward.functions:exact_match",)),
    "reward-model/hutto-movie.yaml": Shipped("minilm"),
    "reward-model/votes.yaml": Shipped("minilm"),
    "node-8gpu/sft.yaml": Shipped("7b"),
    "node-8gpu/reward_model.yaml": Shipped("7b"),
    "node-8gpu/ppo.yaml": Shipped("7b", critic="1.5b", reward="7b"),
    "multi-node/reward_model.yaml": Shipped("32b", nodes=4),
    "multi-node/ppo-70b.yaml": Shipped("72b", nodes=8, critic="7b", reward="32b"),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_configuration_has_nothing_to_change_where_it_fits(
    name: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    shipped = SHIPPED[name]
    node = LAPTOP if name.startswith(("demo", "reward-model", "verifiable")) else GPU_NODE
    site = site_of(node, shipped.nodes, free_disk_bytes=4 * 10**12)
    findings = preflight_of(CONFIGS / name, shipped.overrides(name, shapes, tmp_path / "runs"), site)
    assert not findings.of(State.CHANGE)
    assert not findings.of(State.UNKNOWN)


SMALL_GPUS = replace(GPU_NODE, gpu_memory_bytes=24 * 10**9)
GPU_FAULTS = {
    "policy on a small GPU": ("policy.learner", site_of(SMALL_GPUS), ()),
    "reward model on a small GPU": ("reward", site_of(SMALL_GPUS), ()),
    "engine without room for a sequence": (
        "generator.gpu_memory_utilization",
        site_of(GPU_NODE),
        ("generator.gpu_memory_utilization=0.1",),
    ),
    "engine with more of a GPU than it has": (
        "generator.gpu_memory_utilization",
        site_of(GPU_NODE),
        ("generator.gpus=0.5",),
    ),
    "too few GPUs": ("policy.learner.gpus", site_of(replace(GPU_NODE, gpus=4)), ()),
    "a terabyte of checkpoints": ("checkpoint.keep", site_of(GPU_NODE, free_disk_bytes=10**11), ()),
}


@pytest.mark.parametrize("name", GPU_FAULTS)
def test_a_fault_of_a_gpu_run_is_named_by_its_key(
    name: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    what, site, chosen = GPU_FAULTS[name]
    file = "node-8gpu/ppo.yaml"
    overrides = [*SHIPPED[file].overrides(file, shapes, tmp_path / "runs"), "checkpoint.keep=2", *chosen]
    assert what in {finding.what for finding in preflight_of(CONFIGS / file, overrides, site).of(State.CHANGE)}


def test_there_are_as_many_faults_as_promised():
    assert len(FAULTS) >= 30


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_by_its_key(name: str, workplace: Workplace):
    fault = FAULTS[name]
    overrides = workplace.overrides()
    if fault.config == "demo/sft.yaml":
        overrides += [f"policy.model={workplace.policy}", "policy.learner.trainable_top_layers=1"]
    findings = preflight_of(CONFIGS / fault.config, overrides + fault.plant(workplace), fault.site)
    changes = findings.of(State.CHANGE)
    what = fault.what.format(folder=workplace.folder)
    assert len(changes) == 1, "one fault, one line"
    assert what in f"{changes[0].what}: {changes[0].found}"
    assert fault.said in changes[0].found
    assert changes[0].allowed


@pytest.mark.parametrize("name", ["tiny/ppo.yaml", "tiny/reward_model.yaml"])
def test_a_sound_configuration_has_nothing_to_change(name: str, workplace: Workplace):
    findings = preflight_of(CONFIGS / name, workplace.overrides(), site_of())
    assert {finding.state for finding in findings.found} == {State.OK}


MEASURED = {"generator": 2.283, "reward": 0.412, "policy": 3.378, "reference": 1.162, "critic": 2.945}
"""GB at the peak of each process of SmolLM2 in float32, from `python -m bench.ppo --parts memory`."""


def test_computed_memory_is_within_fifteen_percent_of_what_was_measured(shapes: Path, tiny: Path):
    overrides = [
        f"prompts.path={shapes}/rows.jsonl",
        f"policy.model={shapes}/smollm2",
        f"reward.model={tiny}/reward_model",
        "sampling.prompts_per_step=16",
        "sampling.prompts_per_shard=8",
        "sampling.max_response_tokens=32",
    ]
    config = load_config(PPOConfig, REPOSITORY / "bench" / "ppo" / "memory.yaml", overrides)
    needs = ppo_needs(config, read_policy(config.policy), [RewardSource.read(config.reward[0])], unread=())
    computed = {need.request.role: need.memory.first_bytes / 1e9 for need in needs if need.memory}
    assert computed == {role: pytest.approx(size, rel=0.15) for role, size in MEASURED.items()}


@pytest.mark.parametrize("length", [48, 128, 256])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_those_that_autograd_keeps(dtype: str, length: int, policy_model: str):
    """All storages that are saved for the backward pass, but for the weights."""
    model = load_policy_model(
        policy_model,
        dtype=dtype,
        attention=resolve_attention("auto"),
        temperature=1.0,
        float32_logits=True,
    )
    random = np.random.default_rng(0)
    batch = pack([random.integers(3, 300, length).astype(np.int32) for _ in range(4)], [length // 2] * 4)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    model(batch, lambda part, logprobs, entropies: -logprobs.sum())  # what the head learns of the model
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(batch, lambda part, logprobs, entropies: -logprobs.sum())
    size = read_model_size(policy_model)
    computed = kept_activations(size, Pass(4 * length, 2 * length, length), ITEM_BYTES[dtype], False, on_gpu=False)
    # The embedding, the last norm and the positions are no layer's.
    rest = 4 * length * (4 + 2 * ITEM_BYTES[dtype] + 2 * 4) * size.hidden
    assert computed <= sum(saved.values()) <= computed + rest


def test_a_step_ahead_needs_room_for_another_version(policy_model: str, tiny: Path):
    def needed(*overrides: str) -> int:
        config = load_config(PPOConfig, CONFIGS / "tiny/ppo.yaml", [f"paths.data={tiny.parent}", *overrides])
        size = read_model_size(policy_model)
        snapshots = snapshot_bytes(config, size)
        total = snapshots + rollout_bytes(config, size) + min(config.weights.bucket_mib << 20, snapshots)
        check_object_store(config, size, [replace(LAPTOP, object_store_bytes=total)])
        with pytest.raises(BadInput, match="object_store_gib"):
            check_object_store(config, size, [replace(LAPTOP, object_store_bytes=total - 1)])
        return snapshots

    assert needed() == 4 * read_model_size(policy_model).parameters
    assert needed("algorithm.max_staleness=3") == 4 * needed()


def test_spare_prompts_take_room_and_the_chosen_ones_a_second_time(policy_model: str, tiny: Path):
    uniform = ["critic=null", "algorithm.advantage=grpo", "algorithm.drop_uniform_groups=true"]
    size = read_model_size(policy_model)

    def needed(*overrides: str) -> int:
        settings = [f"paths.data={tiny.parent}", *uniform, *overrides]
        return rollout_bytes(load_config(PPOConfig, CONFIGS / "tiny/ppo.yaml", settings), size)

    step = needed()
    assert needed("algorithm.max_staleness=1") == 2 * step
    with_spare = ("sampling.prompts_per_step=16", "sampling.prompts_per_shard=8", "sampling.spare_prompts=16")
    alone = needed(*with_spare[:2])
    assert needed(*with_spare) == 3 * alone
    assert needed(*with_spare, "algorithm.max_staleness=1") == 5 * alone


def test_checkpoints_that_are_there_need_no_room_again(policy_model: str):
    need = Need(RoleRequest("policy", "policy.learner", ActorSettings()), None, checkpoint=10.0, exported=5.0)
    settings = CheckpointSettings(keep=2)
    for there, needed in {0: 35, 2: 15, 5: 5}.items():
        for free, state in ((needed, State.OK), (needed - 1, State.CHANGE)):
            findings = Findings()
            check_disk(findings, [need], settings, {"a": free}, there)
            assert [finding.state for finding in findings.found] == [state], (there, free)


def test_nodes_are_filled_or_spread_as_ray_does():
    actor = ActorSettings(replicas=4, cpus=1)
    needs = [Need(RoleRequest("reward", "reward", actor), None)]
    two = site_of(count=2).nodes
    assert [len(node) for node in place(needs, two, "PACK")] == [2, 2]
    needs = [Need(RoleRequest("reward", "reward", actor.model_copy(update={"replicas": 2})), None)]
    assert [len(node) for node in place(needs, two, "PACK")] == [2, 0]
    assert [len(node) for node in place(needs, two, "SPREAD")] == [1, 1]


def test_a_look_at_this_node(tmp_path: Path):
    report = look("here", [str(tmp_path), "/no/such/model"], str(tmp_path / "runs" / "deep"))
    assert report.unreadable == ("/no/such/model",)
    assert (report.unwritable, report.versions) == ("", own_versions())
    assert report.memory_bytes > GIB
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    assert look("here", [], str(tmp_path), str(tmp_path / "marker")).unwritable
    (tmp_path / "file").touch()
    assert look("here", [], str(tmp_path / "file" / "runs")).unwritable == "Not a directory"


def test_the_working_directory_is_without_what_is_ignored(tmp_path: Path):
    for name, size in {"code.py": 10, "data/big": 1000, "runs/log": 100, ".git/pack": 5000}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / ".gitignore").write_text("data/\n")
    (tmp_path / ".rayignore").write_text("runs\n")
    ignored = sum((tmp_path / name).stat().st_size for name in (".gitignore", ".rayignore"))
    assert working_directory_bytes(tmp_path) == (10 + ignored, tmp_path / "code.py")


def test_an_environment_without_secrets_is_left_alone(workplace: Workplace):
    chosen = {"TOKENIZERS_PARALLELISM": "'false'", "HF_TOKEN_PATH": "/run/token", "NCCL_DEBUG": "INFO", "KEYRING": "x"}
    overrides = [f"generator.env.{name}={value}" for name, value in chosen.items()]
    assert not preflight_of(CONFIGS / "tiny/ppo.yaml", workplace.overrides() + overrides, site_of()).of(State.CHANGE)


def test_a_model_on_a_hub_that_cannot_be_reached_is_no_fault(workplace: Workplace):
    overrides = [*workplace.overrides(), "policy.model=some-org/some-model"]
    findings = preflight_of(CONFIGS / "tiny/ppo.yaml", overrides, site_of())
    assert not findings.of(State.CHANGE)
    unknown = {finding.what: finding.found for finding in findings.of(State.UNKNOWN)}
    assert unknown.keys() == {"policy.model", "prompts.path", "evaluation.prompts.path", "memory"}
    assert "not readable here: 'some-org/some-model'" in unknown["policy.model"]


def test_the_command_prints_a_line_a_check(workplace: Workplace, capsys: pytest.CaptureFixture[str]):
    tiny = CONFIGS / "tiny/ppo.yaml"
    assert run_preflight(tiny, workplace.overrides())
    printed = capsys.readouterr().out
    assert "Nothing to change" in printed
    assert "✓ policy.model" in printed
    assert "│ generator │" in printed
    assert not run_preflight(tiny, [*workplace.overrides(), "reward.model=/no/such/model", "policy.learner.cpus=900"])
    printed = capsys.readouterr().out
    assert "2 to change" in printed
    assert "✗ reward.model" in printed
    assert "✗ policy.learner.cpus" in printed
    assert "→" in printed


def test_a_file_of_another_command_is_named(tmp_path: Path):
    other = tmp_path / "other.yaml"
    other.write_text("run: {name: x}\nmodels: {}\n")
    for path in (other, tmp_path / "missing.yaml"):
        [finding] = preflight_of(path, [], site_of()).found
        assert finding.state is State.CHANGE
        assert str(path) in finding.what
