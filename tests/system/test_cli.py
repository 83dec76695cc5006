"""Bad input ends before anything starts: exit status 2 and one line that says what, where, and what is allowed."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import yaml

from rlhf_ray.config.load import load_config
from rlhf_ray.config.settings import PPOConfig
from rlhf_ray.failures import BadInput
from rlhf_ray.ppo.inputs import read_inputs
from tests.system.commands import PPO, REPOSITORY, run, start

pytestmark = pytest.mark.timeout(600)

DEADLINE_S = 60.0  # a few seconds where the machine does nothing else
Edit = Callable[[Path], None]


@pytest.fixture
def refused(data_root: Path) -> Callable[..., str]:
    """Reads the tiny configuration with overrides as the command does; gives the one line it ends with."""

    def read(*overrides: str) -> str:
        with pytest.raises(BadInput) as caught:
            read_inputs(load_config(PPOConfig, REPOSITORY / PPO[1], [f"paths.data={data_root}", *overrides]))
        message = str(caught.value)
        assert "\n" not in message
        assert not ray.is_initialized()
        return message

    return read


@pytest.fixture
def edited(tiny: Path, tmp_path: Path) -> Callable[[str, Edit], Path]:
    """A copy of one of the tiny models, changed."""

    def make(name: str, edit: Edit) -> Path:
        copy = tmp_path / name
        shutil.copytree(tiny / name, copy)
        edit(copy)
        return copy

    return make


def changed_json(name: str, **values: object) -> Edit:
    """Sets keys of a JSON file."""

    def edit(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


def cut(name: str, share: float) -> Edit:
    """Keeps the first part of a file."""

    def edit(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return edit


def more_tokens(folder: Path) -> None:
    """Gives the tokenizer tokens that the embedding has no rows for."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra-{number}>" for number in range(8)])
    tokenizer.save_pretrained(folder)


def jsonl(path: Path, *rows: object) -> Path:
    """A file of rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("colour=red", "unknown key 'colour'"),
        ("sampling.prompt_per_step=8", "did you mean 'sampling.prompts_per_step'?"),
        ("steps=many", "steps is 'many'; input should be a valid integer"),
        ("critic=null", "algorithm.advantage is 'gae', which needs a critic section"),
        ("policy.model=/nowhere/policy", "policy.model: there is no directory '/nowhere/policy'"),
        ("prompts.path=/nowhere/prompts.jsonl", "prompts.path: '/nowhere/prompts.jsonl' does not exist"),
        ("evaluation.prompts.path=/nowhere/x.jsonl", "evaluation.prompts.path: '/nowhere/x.jsonl' does not exist"),
        ("reward.model=${paths.data}/tiny/policy", "reward.model: .* is a LlamaForCausalLM"),
        ("policy.model=${paths.data}/tiny/reward_model", "policy.model: .* is a LlamaForSequenceClassification"),
        ("reward.max_length=4096", "reward.max_length: 4096 tokens; at most 256"),
        ("policy.learner.trainable_top_layers=3", "policy.learner.trainable_top_layers: 3 layers; at most 2"),
    ],
)
def test_settings_that_cannot_be_used_are_named(refused: Callable[..., str], override: str, message: str) -> None:
    assert re.search(message, refused(override))


@pytest.mark.parametrize(
    ("key", "edit", "message"),
    [
        ("policy", cut("model.safetensors", 0.5), "model.safetensors' is cut short"),
        ("policy", cut("model.safetensors", 0.001), "is not a safetensors file"),
        ("reward_model", cut("model.safetensors", 0.5), "model.safetensors' is cut short"),
        ("policy", lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        ("policy", lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        ("policy", cut("config.json", 0.5), "cannot be read"),
        ("policy", cut("tokenizer.json", 0.5), "no readable tokenizer"),
        ("policy", changed_json("config.json", vocab_size=100), "does not fit the model: its highest token id is 404"),
        ("policy", more_tokens, "does not fit the model"),
        ("reward_model", changed_json("tokenizer_config.json", pad_token="<eos>"), "no padding token of its own"),
    ],
)
def test_models_that_cannot_be_used_are_named(
    refused: Callable[..., str], edited: Callable[[str, Edit], Path], key: str, edit: Edit, message: str
) -> None:
    setting = {"policy": "policy.model", "reward_model": "reward.model"}[key]
    found = refused(f"{setting}={edited(key, edit)}")
    assert found.startswith(f"{setting}: ")
    assert message in found


@pytest.mark.parametrize(
    ("row", "overrides", "message"),
    [
        ({"prompt": " "}, (), "`prompt` is empty"),
        ({"text": "no prompt"}, (), "has no `prompt`"),
        ({"prompt": "movie " * 90}, (), r"has 9\d tokens; at most 64 \(sampling.max_prompt_tokens\)"),
        (
            {"prompt": "movie " * 245},
            ("sampling.max_prompt_tokens=512",),
            r"with the response 26\d; at most 256 together, the context",
        ),
    ],
)
def test_prompts_that_cannot_be_used_are_named_by_line(
    refused: Callable[..., str], tmp_path: Path, row: dict, overrides: tuple[str, ...], message: str
) -> None:
    path = jsonl(tmp_path / "prompts.jsonl", {"prompt": "I think the movie was"}, row)
    found = refused(f"prompts.path={path}", *overrides)
    assert found.startswith(f"{path}:2: ")
    assert re.search(message, found)


def test_chat_messages_need_a_chat_template_of_the_reward_model(
    refused: Callable[..., str], edited: Callable[[str, Edit], Path], tmp_path: Path
) -> None:
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "I think the movie was"}]
    prompts = jsonl(tmp_path / "prompts.jsonl", {"prompt": turns})
    model = edited("reward_model", lambda folder: (folder / "chat_template.jinja").unlink())
    message = refused(f"prompts.path={prompts}", f"reward.model={model}")
    assert message.startswith(f"reward.model: '{model}' cannot be shown the prompts, which are chat messages: ")
    assert "no chat template" in message


@pytest.fixture
def configuration(tmp_path: Path, data_root: Path) -> Path:
    """A file that is wrong in its sixth line."""
    text = (REPOSITORY / PPO[1]).read_text()
    path = tmp_path / "wrong.yaml"
    path.write_text("\n".join([*text.splitlines()[:5], "modle: x", *text.splitlines()[5:]]))
    return path


def test_commands_end_with_status_2_and_one_line_before_anything_starts(
    configuration: Path, data_root: Path, tmp_path: Path
) -> None:
    """The real commands, at the same time, with an error of each source: file, override, model, data, folder."""
    pairs = jsonl(
        tmp_path / "pairs.jsonl",
        {"prompt": "The movie", "chosen": " is good.", "rejected": " is bad."},
        {"prompt": "The movie", "rejected": " is bad."},
    )
    train_rm = tmp_path / "train_rm.yaml"
    train_rm.write_text(
        yaml.safe_dump(
            {
                "run": {"name": "tiny-rm"},
                "model": str(data_root / "tiny" / "reward_model"),
                "pairs": {"path": str(pairs)},
                "learner": {"dtype": "float32"},
                "training": {"max_length": 128},
            }
        )
    )
    cases = {
        ("ppo", str(configuration)): rf"{configuration}:6: unknown key 'modle'; .*",
        (*PPO, "sampling.prompts_per_stpe=8"): r".*did you mean 'sampling.prompts_per_step'\?",
        (*PPO, "policy.model=/nowhere"): r"policy.model: there is no directory '/nowhere'; .*",
        ("train-rm", str(train_rm)): rf"{pairs}:2: has no `chosen`; .*",
        ("ppo", "nowhere.yaml"): r"nowhere.yaml: there is no such file; .*",
    }
    settings = (f"paths.data={data_root}", f"paths.runs={tmp_path}/runs")
    commands = [start((*arguments, *settings), tmp_path / f"output-{number}") for number, arguments in enumerate(cases)]
    for command, message in zip(commands, cases.values(), strict=True):
        assert command.wait(2 * DEADLINE_S) == 2, command.stderr
        assert re.fullmatch(f"bad input: {message}\n", command.stderr), command.stderr
        assert command.stdout == ""
        assert not {name for name in command.names if name in ("raylet", "gcs_server")}
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "generator.cpus=1000",
            r"generator.cpus: the roles ask for 1001.\d+ CPUs \(generator 1000, .*\); the cluster has",
        ),
        ("policy.learner.gpus=1", r"policy.learner.gpus: the roles ask for 1 GPUs .*; the cluster has \d"),
    ],
)
def test_more_than_the_cluster_has_is_refused_before_a_role_starts(
    data_root: Path, tmp_path: Path, override: str, message: str
) -> None:
    settings = (f"paths.data={data_root}", f"paths.runs={tmp_path}/runs", "cluster.num_cpus=2")
    command = run((*PPO, *settings, override), tmp_path / "output", 2 * DEADLINE_S)  # Ray itself is started
    assert command.process.returncode == 2
    assert re.fullmatch(f"bad input: {message}.*\n", command.stderr), command.stderr
    assert command.stdout == ""
    assert not (tmp_path / "runs").exists()
    assert command.left_running() == []


def test_a_cluster_that_is_not_there_is_named(data_root: Path, tmp_path: Path) -> None:
    settings = (f"paths.data={data_root}", f"paths.runs={tmp_path}/runs", "cluster.address=127.0.0.1:1")
    command = run((*PPO, *settings), tmp_path / "output", DEADLINE_S)
    assert command.process.returncode == 2, command.stderr
    assert command.stderr.startswith("bad input: cluster.address: no Ray cluster answers at '127.0.0.1:1' ([Errno 111]")
    assert command.stderr.count("\n") == 1


def test_every_command_explains_itself_and_a_wrong_call_ends_with_status_2(tmp_path: Path) -> None:
    """At the same time: most of a call is imports."""
    explained = ("prepare", "sft", "train-rm", "eval-rm", "ppo", "serve-rm")
    wrong = {("ppo",): "CONFIG", ("pppo",): "pppo", ("ppo", "x", "--no"): "--no"}
    calls = [("--help",), *((name, "--help") for name in explained), *wrong]
    commands = dict(zip(calls, (start(call, tmp_path / f"output-{n}") for n, call in enumerate(calls)), strict=True))
    for call, command in commands.items():
        assert command.wait(len(calls) * DEADLINE_S) == (2 if call in wrong else 0), call
        if call[0] in explained and call not in wrong:
            assert {"Reads ", "Writes "} <= set(re.findall(r"Reads |Writes ", command.stdout)), call
        if call in wrong:
            assert wrong[call] in command.stderr
            assert "Traceback" not in command.stderr


def test_the_installed_command_is_the_module(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("rlhf-ray")
    if not script.exists():
        pytest.skip("the package is not installed in this environment")
    environment = {**os.environ, "COLUMNS": "200"}
    shown = [
        subprocess.run([*command, "ppo", "--help"], cwd=REPOSITORY, env=environment, capture_output=True, timeout=60)
        for command in ([str(script)], [sys.executable, "-m", "rlhf_ray"])
    ]
    assert [each.returncode for each in shown] == [0, 0]
    assert shown[0].stdout.split(b"\n")[2:] == shown[1].stdout.split(b"\n")[2:]  # apart from the line with its name
