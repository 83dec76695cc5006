"""Secrets stay in the environment and in files of their own: nothing that a run writes or says has one."""

import logging
from contextlib import suppress
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from rlhf_ray.config.load import load_config
from rlhf_ray.config.reward import RewardSettings
from rlhf_ray.config.settings import PPOConfig, SFTConfig
from rlhf_ray.failures import BadInput, FailureKind, RoleFailure
from rlhf_ray.reward.core.source import RewardSource
from rlhf_ray.runtime.run import Run
from tests.conftest import REPOSITORY
from tests.loopback import serving

TINY = REPOSITORY / "configs" / "tiny" / "ppo.yaml"
SECRETS = {
    "WANDB_API_KEY": "wandb0123456789abcdef0123456789abcdef0123",
    "HF_TOKEN": "hf_planted0123456789abcdef",
    "RLHF_RAY_TOKEN": "service-planted-0123456789",
    "RAY_AUTH_TOKEN": "ray-planted-0123456789abcdef",
}


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return SECRETS


def refusal(*overrides: str) -> str:
    with pytest.raises(BadInput) as caught:
        load_config(PPOConfig, TINY, overrides)
    return str(caught.value)


@pytest.mark.parametrize("section", ["policy.learner", "critic.learner", "reference", "reward", "generator"])
@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "api_key"])
def test_a_secret_in_an_environment_block_is_refused_without_being_said(section: str, name: str):
    for override in (f"{section}.env.{name}=planted0", f"{section}.env={{{name}: planted0}}"):
        message = refusal(override)
        assert f"{name} is a secret" in message
        assert "planted0" not in message


def test_what_is_no_secret_may_be_in_an_environment_block():
    names = ("NCCL_SOCKET_IFNAME", "TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH", "RLHF_KEY_FILE", "KEYBOARD")
    config = load_config(PPOConfig, TINY, [f"generator.env.{name}=x" for name in names])
    assert tuple(config.generator.env) == names


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("key", ["policy.model", "tracking.wandb.project", "generator.env.SOMETHING", "reward.url"])
def test_a_secret_that_is_interpolated_into_a_setting_is_refused(planted: dict[str, str], name: str, key: str):
    message = refusal(f"{key}=before-${{oc.env:{name}}}")
    assert f"{key} holds the value of the environment variable {name}" in message
    assert planted[name] not in message


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("trust_remote_code: true", "code that lies beside a model is never run"),
        ("load_format: pt", "load_format: 'pt' opens pickles"),
        ("load_format: auto", "load_format: 'auto' opens pickles"),
        ("hf_token: hf_planted", "hf_token: the configuration is kept"),
    ],
)
def test_the_engine_is_not_told_to_run_code_or_to_keep_a_secret(engine: str, message: str):
    assert message in refusal(f"generator.engine={{{engine}}}")
    assert "hf_planted" not in refusal(f"generator.engine={{{engine}}}")


def test_no_file_and_no_log_of_a_run_has_a_secret(
    planted: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
):
    """A service refuses the token, and a run with both sinks fails: what is told, logged and written has no secret."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers here
    caplog.set_level(logging.DEBUG)
    token = "file-planted-0123456789abcdef"
    (tmp_path / "token").write_text(token)
    app = FastAPI()
    app.add_api_route("/v1/models", lambda: JSONResponse({"error": {"type": "unauthorized"}}, 401))
    with serving(app) as url:
        reward = RewardSettings.model_validate({"url": url, "token_file": str(tmp_path / "token")})
        with pytest.raises(BadInput, match="refuses the token") as caught:
            RewardSource.read(reward)
        in_memory = repr((reward, RewardSource(reward, "reward").constructor("policy")))
    settings = [f"paths.runs={tmp_path}/runs", "run.name=x", "tracking.wandb.mode=offline", "tracking.tensorboard=true"]
    config = load_config(SFTConfig, REPOSITORY / "configs" / "demo" / "sft.yaml", settings)
    with (
        suppress(RoleFailure),
        Run(config, "sft", "title", 1, (), config.checkpoint, resume=True) as run,
    ):
        run.tracker.step({"step": 1, "loss": 1.0})
        raise RoleFailure(FailureKind.INFRASTRUCTURE, "policy-0", "node", str(caught.value))
    printed = capfd.readouterr()
    said = [str(caught.value), in_memory, caplog.text, printed.out, printed.err]
    written = [path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert (run.folder.path / "config.yaml").exists()
    assert list(run.folder.wandb.glob("offline-run-*/*.wandb"))
    for secret in (*planted.values(), token):
        assert not [text for text in said if secret in text]
        assert not [content for content in written if secret.encode() in content]
