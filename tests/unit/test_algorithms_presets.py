"""The presets in docs/algorithms.md are valid as they are written there, and are what their names say."""

import re
from pathlib import Path

import pytest

from rlhf_ray.config.algorithm import ADVANTAGES
from rlhf_ray.config.load import load_config
from rlhf_ray.config.settings import PPOConfig
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "algorithms.md").read_text(encoding="utf-8")
PRESETS: dict[str, str] = dict(
    re.findall(r"^### (.+?)\n.*?```yaml\n(.*?)```", PAGE.split("## Presets\n")[1], re.DOTALL | re.MULTILINE)
)
REST = """
run: {name: preset}
prompts: {path: prompts.jsonl}
policy: {model: models/policy}
reward: {model: models/reward}
"""


def load(name: str, folder: Path) -> PPOConfig:
    path = folder / "preset.yaml"
    path.write_text(PRESETS[name] + REST, encoding="utf-8")
    return load_config(PPOConfig, path)


def test_every_algorithm_has_one() -> None:
    assert list(PRESETS) == [
        *("PPO", "GRPO", "Dr. GRPO", "RLOO", "REINFORCE++", "REINFORCE++ baseline", "DAPO", "GSPO", "CISPO")
    ]


@pytest.mark.parametrize(
    ("name", "advantage", "loss", "aggregation", "whitened", "kl"),
    [
        ("PPO", "gae", "ppo", "token", True, "reward"),
        ("GRPO", "grpo", "ppo", "sequence", False, "loss"),
        ("Dr. GRPO", "group_mean", "ppo", "constant", False, None),
        ("RLOO", "rloo", "ppo", "constant", False, "reward"),
        ("REINFORCE++", "return_to_go", "ppo", "token", True, "reward"),
        ("REINFORCE++ baseline", "group_mean", "ppo", "token", True, "loss"),
        ("DAPO", "grpo", "ppo", "token", False, None),
        ("GSPO", "grpo", "gspo", "sequence", False, None),
        ("CISPO", "grpo", "cispo", "token", False, None),
    ],
)
def test_a_preset_is_valid_and_is_its_algorithm(
    tmp_path: Path, name: str, advantage: str, loss: str, aggregation: str, whitened: bool, kl: str | None
) -> None:
    config = load(name, tmp_path)
    algorithm = config.algorithm
    assert (algorithm.advantage, algorithm.policy_loss) == (advantage, loss)
    assert (algorithm.loss_aggregation, algorithm.advantage_whiten) == (aggregation, whitened)
    assert (algorithm.kl.placement if algorithm.kl.coefficient else None) == kl
    assert (config.reference is None) == (kl is None)
    assert (config.critic is not None) == ADVANTAGES[advantage].critic


def test_every_setting_and_metric_that_the_page_names_exists() -> None:
    settings = (REPOSITORY / "docs" / "settings.md").read_text(encoding="utf-8")
    metrics = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    body = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
    for name in re.findall(r"`((?:importance|group|mismatch|policy|response)/[a-z_]+)`", body):
        assert f"| `{name}` |" in metrics
    for section, key in re.findall(r"`(length|importance|kl)\.(?!py\b)([a-z_]+)", body):
        assert f"| `{key}` |" in settings, f"{section}.{key}"
