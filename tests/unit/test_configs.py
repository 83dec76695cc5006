"""Every configuration that comes with the project is valid and asks for as many GPUs as it says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from rlhf_ray.config.base import ActorSettings
from rlhf_ray.config.load import load_config
from rlhf_ray.config.reward_model import RewardEvaluationConfig, RewardModelConfig
from rlhf_ray.config.serving import ServingConfig
from rlhf_ray.config.settings import PPOConfig, RunConfig, SFTConfig

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
GPU_FILES = [name for name in FILES if name.startswith(("node-8gpu/", "multi-node/", "serve/gpu-"))]
# The first of these sections that a file has says whose it is.
CLASSES: dict[str, type[RunConfig]] = {
    "models": ServingConfig,
    "text": SFTConfig,
    "prompts": PPOConfig,
    "learner": RewardModelConfig,
    "pairs": RewardEvaluationConfig,
}


def config_class(path: Path) -> type[RunConfig]:
    sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    return next(found for section, found in CLASSES.items() if section in sections)


def load(name: str) -> RunConfig:
    path = CONFIGS / name
    return load_config(config_class(path), path)


def load_ppo(name: str) -> PPOConfig:
    config = load(name)
    assert isinstance(config, PPOConfig)
    return config


def actors(settings: BaseModel) -> Iterator[ActorSettings]:
    """Every role's settings, wherever they are in the configuration."""
    if isinstance(settings, ActorSettings):
        yield settings
        return
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        for section in value if isinstance(value, tuple) else (value,):
            if isinstance(section, BaseModel):
                yield from actors(section)


def test_the_runs_that_the_readme_promises_are_there():
    promised = {"node-8gpu/sft.yaml", "node-8gpu/reward_model.yaml", "node-8gpu/ppo.yaml", "multi-node/ppo-70b.yaml"}
    assert promised <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_gpus_asked_for_are_those_of_the_header(name):
    config = load(name)
    each = [actor.replicas * actor.gpus for actor in actors(config)]
    # The roles of PPO are there together; learner and scorers of a reward model one after the other.
    asked = sum(each) if isinstance(config, PPOConfig) else max(each)
    stated = re.match(r"# gpus: (\d+)\n", (CONFIGS / name).read_text(encoding="utf-8"))
    assert asked == (int(stated[1]) if stated else 0)
    assert stated or name not in GPU_FILES, "the first line says how many GPUs"


@pytest.mark.parametrize("name", GPU_FILES)
def test_every_role_of_a_gpu_run_is_on_a_gpu_in_bfloat16(name):
    for actor in actors(load(name)):
        assert actor.gpus > 0
        assert actor.model_dump()["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", [name for name in GPU_FILES if "ppo" in name])
def test_gpu_ppo_reserves_what_an_engine_spreads_over_and_nccl_needs(name):
    config = load_ppo(name)
    assert config.generator.gpus == config.generator.tensor_parallel
    # NCCL has one rank on a GPU: a fraction could put two learner ranks, or learner and engine, on the same one.
    assert config.weights.transport == "nccl"
    learners = [config.policy.learner, *([config.critic.learner] if config.critic else [])]
    assert all(learner.gpus == 1 for learner in learners)
    assert config.generator.kv_cache_gib is None


@pytest.mark.parametrize("name", [name for name in GPU_FILES if "ppo" in name])
def test_gpu_ppo_samples_all_shards_of_a_step_at_once(name):
    config = load_ppo(name)
    sampling, generator = config.sampling, config.generator
    shards_of_each = sampling.num_shards / generator.replicas
    assert generator.shards_in_flight == shards_of_each
    responses = shards_of_each * sampling.prompts_per_shard * sampling.samples_per_prompt
    assert responses <= generator.max_concurrent_sequences


def test_a_reference_that_does_not_fit_one_gpu_is_spread_over_several():
    reference = load_ppo("multi-node/ppo-70b.yaml").reference
    assert reference is not None
    assert reference.sharded
    assert reference.gpus == 1, "NCCL has one rank on a GPU"


@pytest.mark.parametrize("folder", ["node-8gpu", "multi-node"])
def test_ppo_takes_the_reward_model_that_its_folder_trains(folder):
    reward_model = load(f"{folder}/reward_model.yaml")
    [ppo_file] = [name for name in GPU_FILES if name.startswith(f"{folder}/ppo")]
    ppo = load_ppo(ppo_file)
    assert isinstance(reward_model, RewardModelConfig)
    [reward] = ppo.reward
    assert reward.model == f"{reward_model.paths.runs}/{reward_model.run.name}/reward_model"
    longest = ppo.sampling.max_prompt_tokens + ppo.sampling.max_response_tokens
    assert reward_model.training.max_length > longest


def test_the_configurations_in_the_readme_are_valid(tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", (CONFIGS.parent / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    loaded = []
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block, encoding="utf-8")
        loaded.append(type(load_config(config_class(path), path)))
    assert {RewardModelConfig, PPOConfig} <= set(loaded)
