from pathlib import Path

import pytest
import yaml

from rlhf_ray.config.load import dump_config, load_config
from rlhf_ray.config.reward_model import RewardModelConfig
from rlhf_ray.config.settings import PPOConfig, SFTConfig
from rlhf_ray.failures import BadInput

COMPLETE = """\
run:
  name: tiny
prompts:
  path: ${paths.data}/prompts.jsonl
policy:
  model: models/policy
  learner:
    learning_rate: 1e-5
critic: {}
reward:
  model: models/reward
"""


@pytest.fixture
def load(tmp_path):
    def run(text: str, *overrides: str) -> PPOConfig:
        path = tmp_path / "ppo.yaml"
        path.write_text(text)
        return load_config(PPOConfig, path, overrides)

    return run


@pytest.fixture
def refuse(load, tmp_path):
    def run(text: str, *overrides: str) -> BadInput:
        with pytest.raises(BadInput) as caught:
            load(text, *overrides)
        assert "\n" not in str(caught.value)
        caught.value.where = caught.value.where.replace(f"{tmp_path}/", "")
        return caught.value

    return run


def test_a_complete_file_loads_with_its_values_and_defaults(load):
    config = load(COMPLETE)
    assert config.run.name == "tiny"
    assert config.policy.learner.learning_rate == 1e-5
    assert config.sampling.samples_per_prompt == 4
    assert config.critic is not None


def test_settings_cannot_be_changed_afterwards(load):
    with pytest.raises(ValueError, match="frozen"):
        load(COMPLETE).run.seed = 3


@pytest.mark.parametrize(
    ("lines", "line", "found", "allowed"),
    [
        ("stesp: 3", 12, "unknown key 'stesp'", "did you mean 'steps'?"),
        (
            "algorithm:\n  kl:\n    coeficient: 0.1",
            14,
            "unknown key 'algorithm.kl.coeficient'",
            "did you mean 'algorithm.kl.coefficient'?",
        ),
        ("weights:\n  zzz: 1", 13, "unknown key 'weights.zzz'", "known: transport, bucket_mib"),
        ("steps: many", 12, "steps is 'many'", "valid integer"),
        ("sampling: 3", 12, "sampling is 3", "a section with keys of its own"),
        ("steps: 0", 12, "steps is 0", "greater than or equal to 1"),
        (
            "algorithm:\n  advantage: gea",
            13,
            "algorithm.advantage is 'gea'",
            "'gae', 'rloo', 'grpo', 'group_mean' or 'return_to_go'",
        ),
        ("steps: ${run.nothing}", 12, "steps: Interpolation key 'run.nothing' not found", "resolved"),
        ("steps: ${oc.env:SURELY_NOT_SET}", 12, "SURELY_NOT_SET", "resolved"),
        ("steps: ${steps}", 12, "Recursive interpolation", "resolved"),
        ("run:\n  name: twice", 12, "duplicate key run", "a YAML mapping"),
        ("steps: [1", 13, "not valid YAML", "a YAML mapping"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_line(refuse, lines, line, found, allowed):
    error = refuse(COMPLETE + lines + "\n")
    assert error.where == f"ppo.yaml:{line}"
    assert found in error.found
    assert allowed in error.allowed


def test_a_missing_key_is_named_with_its_section_and_meaning(refuse):
    error = refuse(COMPLETE.replace("  model: models/reward", "  batch_size: 8"))
    assert error.where == "ppo.yaml:10"
    assert error.found == "'reward.model' is missing"
    assert "AutoModelForSequenceClassification" in error.allowed


def test_a_misspelt_key_is_reported_before_the_key_it_should_have_been(refuse):
    error = refuse(COMPLETE.replace("  model: models/reward", "  modle: models/reward"))
    assert (error.where, error.found) == ("ppo.yaml:11", "unknown key 'reward.modle'")
    assert error.allowed == "did you mean 'reward.model'? (and 1 more)"


def test_overrides_win_and_are_read_as_yaml(load):
    config = load(
        COMPLETE,
        "steps=7",
        "policy.learner.learning_rate=3e-6",
        "algorithm.importance=null",
        "reward.env={A: x}",
        "policy.model=a=b",
        "steps=8",
    )
    assert config.steps == 8
    assert config.policy.learner.learning_rate == 3e-6
    assert config.algorithm.importance is None
    [reward] = config.reward
    assert reward.env == {"A": "x"}
    assert config.policy.model == "a=b"


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("steps", "is not an override"),
        ("=3", "is not an override"),
        ("run..name=x", "is not an override"),
        ("steps=[1", "cannot be read"),
        ("stepz=3", "unknown key 'stepz'"),
        ("polcy.model=x", "unknown key 'polcy'"),
        ("policy.lerner.betas=[0,1]", "unknown key 'policy.lerner'"),
        ("steps.a=3", "steps is {'a': 3}"),
        ("steps=x", "steps is 'x'"),
        ("run.name=a b", "run.name is 'a b'"),
    ],
)
def test_a_wrong_override_is_named_not_the_file(refuse, override, found):
    error = refuse(COMPLETE, "steps=5", override)
    assert error.where == f"override '{override}'"
    assert found in error.found


def test_an_override_beside_a_mistake_in_the_file_is_not_blamed(refuse):
    """Not for a section whose keys contradict each other, nor for a key that only begins alike."""
    sampling = "sampling:\n  prompts_per_step: 12\n  prompts_per_shard: 8\n"
    error = refuse(COMPLETE + sampling, "sampling.temperature=0.5")
    assert (error.where, error.found.startswith("sampling: prompts_per_step (12)")) == ("ppo.yaml:12", True)
    assert refuse(COMPLETE + "step: 3\n", "steps=3").where == "ppo.yaml:12"


def test_interpolation_reaches_the_file_its_defaults_overrides_and_the_environment(load, monkeypatch):
    monkeypatch.setenv("MODEL_FOLDER", "/models")
    text = COMPLETE.replace("models/policy", "${oc.env:MODEL_FOLDER}/${run.name}")
    assert load(text).prompts.path == "data/prompts.jsonl"
    config = load(text, "paths.data=/elsewhere", "run.name=other")
    assert config.prompts.path == "/elsewhere/prompts.jsonl"
    assert config.policy.model == "/models/other"


def test_dump_and_load_give_the_same_settings(load):
    config = load(
        COMPLETE,
        "generator.engine={max_model_len: 64, sizes: [1, 2]}",
        "algorithm.score_clip=1e-7",
        "algorithm.importance={level: sequence, truncate: null, mask: [0.25, 4]}",
        "policy.learner.deepspeed.zero_optimization.offload_optimizer.device=cpu",
        "run.name=nan",
    )
    assert load(dump_config(config)) == config


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["critic=null"], "critic"),
        (["algorithm.advantage=rloo"], "critic"),
        (["algorithm.advantage=grpo", "critic=null", "sampling.samples_per_prompt=1"], "sampling.samples_per_prompt"),
        (
            ["algorithm.advantage=rloo", "critic=null", "algorithm.critic_warmup_steps=2"],
            "algorithm.critic_warmup_steps",
        ),
        (["algorithm.advantage=return_to_go"], "critic"),
        (
            ["algorithm.advantage=group_mean", "critic=null", "sampling.samples_per_prompt=1"],
            "sampling.samples_per_prompt",
        ),
        (["algorithm.length.rescale=0.5", "sampling.samples_per_prompt=1"], "sampling.samples_per_prompt"),
        (["algorithm.length.overlong_buffer=500"], "algorithm.length.overlong_buffer"),
        (["algorithm.length.penalty=0.1", "algorithm.length.target=500"], "algorithm.length.target"),
        (["algorithm.length.target=5"], "algorithm.length: target"),
        (["algorithm.length.rescale=0.5", "algorithm.reward_whiten=true"], "algorithm: length.rescale"),
        (["algorithm.old_logprobs=engine"], "algorithm: importance"),
        (["algorithm.importance.truncate=null"], "algorithm.importance: truncate"),
        (["algorithm.importance.mask=[1.5, 2]"], "algorithm.importance: mask"),
        (["algorithm.importance.mask=[0.5, 2]"], "algorithm.importance: truncate"),
        (["algorithm.policy_loss=cispo", "algorithm.dual_clip=3"], "algorithm: dual_clip"),
        (["algorithm.drop_uniform_groups=true"], "algorithm: drop_uniform_groups"),
        (["reference=null"], "reference"),
        (["sampling.prompts_per_step=12"], "sampling"),
        (["sampling.spare_prompts=4"], "sampling"),
        (["sampling.spare_prompts=8"], "sampling.spare_prompts"),
        (["policy.learner.replicas=3"], "policy.learner.replicas"),
        (["critic.learner.replicas=3"], "critic.learner.replicas"),
        (["algorithm.minibatches=33"], "algorithm.minibatches"),
        (["weights.transport=nccl"], "weights.transport"),
        (["generator.gpus=2"], "generator: gpus"),
        (["generator.gpus=0.5", "generator.tensor_parallel=2"], "generator: gpus"),
        (["generator.tensor_parallel=2"], "generator: tensor_parallel"),
        (["generator.gpus=2", "generator.tensor_parallel=2"], "weights.transport"),
        (["algorithm.critic_warmup_steps=5", "steps=5"], "algorithm.critic_warmup_steps"),
        (["checkpoint.copy_to=sftp://me:secret@host/runs"], "checkpoint.copy_to"),
        (["reward.timeout_s=5"], "reward: timeout_s"),
        (["reward.token_file=t"], "reward: token_file"),
        (["reward.url=http://127.0.0.1:1", "reward.dtype=bfloat16"], "reward: dtype"),
        (["reward.url=http://127.0.0.1:1", "reward.require_release=false"], "reward: require_release"),
        (["reward.sharded=true"], "reward: sharded"),
        (["reward.sharded=true", "reward.replicas=2", "reward.gpus=0.5"], "reward: gpus"),
        (["reward.url=http://127.0.0.1:1", "reward.sharded=true", "reward.replicas=2"], "reward: sharded"),
        (["reference.sharded=true"], "reference: sharded"),
        (["reference.sharded=true", "reference.replicas=2", "reference.gpus=0.5"], "reference: gpus"),
        (["reference.sharded=true", "reference.replicas=3"], "reference.replicas"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_key(refuse, overrides, key):
    assert refuse(COMPLETE, *overrides).found.startswith(f"{key}: ")


def test_what_the_rules_ask_for_is_accepted(load):
    load(COMPLETE, "critic=null", "algorithm.advantage=rloo", "reference=null", "algorithm.kl.coefficient=0")
    load(COMPLETE, "weights.transport=nccl", "generator.gpus=1", "policy.learner.gpus=1")
    load(COMPLETE, "reference.sharded=true", "reference.replicas=2")
    load(COMPLETE, "reference.replicas=3")  # each holds the whole model: no pass is a collective
    load(COMPLETE, "critic=null", "algorithm.advantage=return_to_go", "sampling.samples_per_prompt=1")
    dynamic = ("algorithm.advantage=grpo", "critic=null", "algorithm.drop_uniform_groups=true")
    assert load(COMPLETE, *dynamic, "sampling.spare_prompts=8").sampling.prompts_drawn == 24
    load(COMPLETE, "algorithm.old_logprobs=engine", "algorithm.importance=null")
    load(COMPLETE, "algorithm.importance={truncate: null, mask: [0.5, 2]}")
    load(COMPLETE, "algorithm.importance={level: sequence, truncate: 1.5, mask: [0.5, 2]}")


@pytest.mark.parametrize(("gpus", "tensor_parallel"), [(1, 1), (8, 8), (0.5, 1)])
def test_an_engine_has_the_gpus_it_is_spread_over_or_shares_one(load, gpus, tensor_parallel):
    nccl = ("weights.transport=nccl", "policy.learner.gpus=1")
    load(COMPLETE, f"generator.gpus={gpus}", f"generator.tensor_parallel={tensor_parallel}", *nccl)


def test_only_on_a_cpu_does_the_kv_cache_have_a_size_unless_given(load):
    def kv_cache_bytes(*overrides: str) -> int | None:
        return load(COMPLETE, *overrides).generator.kv_cache_bytes

    assert kv_cache_bytes() == 1 << 29
    assert kv_cache_bytes("generator.gpus=1") is None
    assert kv_cache_bytes("generator.gpus=1", "generator.kv_cache_gib=2") == 2 << 30
    assert kv_cache_bytes("generator.kv_cache_gib=0.25") == 1 << 28


def test_other_commands_have_their_own_keys(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"run": {"name": "x"}, "text": {"path": "t"}, "policy": {"model": "m"}}))
    assert load_config(SFTConfig, path).epochs == 1
    with pytest.raises(BadInput, match="unknown key 'policy'"):
        load_config(RewardModelConfig, path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "there is no such file"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"- a\n- b\n", "is a ListConfig"),
        (b"", "'run' is missing"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content, found):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        load_config(PPOConfig, path)
    assert caught.value.where == str(path)
    assert found in caught.value.found


def test_a_bare_off_is_the_word(tmp_path):
    path = tmp_path / "rm.yaml"
    path.write_text("run: {name: a}\nmodel: m\npairs: {path: p}\naggregation: {length_penalty: off}\n")
    config = load_config(RewardModelConfig, path, ["tracking.progress=off"])
    assert (config.tracking.progress, config.aggregation.length_penalty) == ("off", "off")


def test_validation_pairs_that_nothing_is_judged_on_are_refused(tmp_path):
    path = tmp_path / "rm.yaml"
    path.write_text("run: {name: a}\nmodel: m\npairs: {path: p}\nvalidation: {path: v}\n")
    with pytest.raises(BadInput, match=r"validation: nothing is judged on it; set training\.evaluate_every too"):
        load_config(RewardModelConfig, path)
    assert load_config(RewardModelConfig, path, ["training.evaluate_every=5"]).validation is not None


def rewards(written: str) -> str:
    """The complete configuration with other sources of rewards, as YAML behind `reward:`."""
    return COMPLETE.replace("reward:\n  model: models/reward\n", f"reward: {written}\n")


def test_rewards_come_from_one_source_or_from_a_list_of_them(load, tmp_path):
    several = (
        "[{name: helpful, model: m}, {url: 'http://x'}, {function: 'my.rewards:exact', weight: 0.5, batch_size: 9}]"
    )
    assert [(each.name, each.weight) for each in load(COMPLETE).reward] == [("model", 1.0)]
    sources = load(rewards(several)).reward
    assert [each.name for each in sources] == ["helpful", "service", "exact"]
    assert [each.weight for each in sources] == [1.0, 1.0, 0.5]
    assert [each.batch_size for each in sources] == [64, 64, 9]
    [function] = load(rewards("{function: 'my:exact'}")).reward
    assert (function.batch_size, function.timeout_s) == (1, 10.0)
    for text in (COMPLETE, rewards(several), rewards("[{function: 'my:exact', timeout_s: 5}]")):
        (tmp_path / "again.yaml").write_text(dump_config(load(text)))
        assert load_config(PPOConfig, tmp_path / "again.yaml") == load(text)


def test_overrides_reach_a_source_alone_and_in_a_list(load):
    [source] = load(COMPLETE, "reward.model=other").reward
    assert source.model == "other"
    one, other = load(rewards("[{model: m}, {function: 'my:f'}]"), "reward.1.weight=0.25", "reward.0.name=a").reward
    assert (one.name, other.weight) == ("a", 0.25)
    assert len(load(COMPLETE, "reward=[{model: m}, {function: my:f}]").reward) == 2
    assert load(rewards("[{model: m}]"), "policy.model=${paths.runs}/x").policy.model == "runs/x"


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("{function: 'my:f', model: m}", "reward: model: with function"),
        ("{function: 'my:f', url: 'http://x'}", "reward: url: with function"),
        ("[{model: m}, {function: 'my:f', max_length: 9}]", "reward.1: max_length: with function"),
        ("[{model: m}, {function: 'my:f', require_release: false}]", "reward.1: require_release: with function"),
        ("{url: 'http://x', batch_invariant: true}", "reward: batch_invariant: with url"),
        ("{function: my.f}", "reward: function: 'my.f' is not module:name"),
        ("{function: '../my:f'}", "reward: function: '../my:f' is not module:name"),
        ("{model: m, name: a/b}", "reward: name: 'a/b' may have"),
        ("[{model: m}, {model: n}]", "reward: two sources have the name 'model'"),
        ("[{model: m, weight: 0}]", "reward: no source has a weight other than 0"),
        ("[]", "reward: no source"),
        ("[{modle: m}]", "unknown key 'reward.0.modle'"),
        ("[{name: a}]", "'reward.0.model' is missing"),
        ("[{model: m, weight: .inf}]", "reward.0.weight is inf"),
        ("[3]", "reward.0 is 3"),
    ],
)
def test_sources_that_contradict_themselves_are_refused_with_their_key(refuse, written, found):
    error = refuse(rewards(written))
    assert found in error.found
    assert error.where == "ppo.yaml:10"
