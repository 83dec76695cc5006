"""Servers as a benchmark runs them: started, waited for, stopped; and models for them to serve."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench.load import request_body

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 90.0
_POLL_S = 0.1
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] != 'assistant' %}{{ '\\n' }}{% endif %}{% endfor %}"
)
"""For models without one: the turns below each other."""
_HEAD_STD = 0.5
"""Of a new head: wide enough for scores of the size that trained models give, a few units."""


@dataclass(frozen=True)
class RunningServer:
    """A server that scores.

    Attributes:
        url: without a path.
        process: of the command that was started.
        first_score_s: from the command to the first score.
    """

    url: str
    process: subprocess.Popen[bytes]
    first_score_s: float


@contextmanager
def running_server(
    command: Sequence[str], port: int, environment: Mapping[str, str] | None = None, token: str = ""
) -> Iterator[RunningServer]:
    """Start a server, wait until it scores a text, and stop it as a terminal would.

    Raises:
        RuntimeError: it ended, or did not score in time, or did not stop in time.
    """
    url = f"http://127.0.0.1:{port}"
    started = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, **(environment or {})}, start_new_session=True)
    try:
        while not _scores(url, token):
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
            if time.perf_counter() - started > START_TIMEOUT_S:
                raise RuntimeError(f"{' '.join(command)} did not score within {START_TIMEOUT_S:g} s")
            wait_for(process, _POLL_S)
        yield RunningServer(url, process, time.perf_counter() - started)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        if not wait_for(process, STOP_TIMEOUT_S):
            os.killpg(process.pid, signal.SIGKILL)
            raise RuntimeError(f"{' '.join(command)} did not stop within {STOP_TIMEOUT_S:g} s")


def serve_command(config: Path, overrides: Sequence[str] = ()) -> list[str]:
    """The command line of the service."""
    return [sys.executable, "-m", "rlhf_ray", "serve-rm", str(config), *overrides]


def write_config(path: Path, models: Sequence[Mapping[str, object]], port: int, **sections: object) -> Path:
    """A configuration of the service; runs go beside it."""
    content = {
        "run": {"name": path.stem},
        "paths": {"runs": str(path.parent / "runs")},
        "models": {model["name"]: {key: model[key] for key in model if key != "name"} for model in models},
        "endpoint": {"port": port},
        **sections,
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def free_port() -> int:
    """A port that nothing listens at now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def get_json(url: str, token: str = "") -> Any:
    """What a route answers."""
    with urllib.request.urlopen(_request(url, token), timeout=30) as response:
        return json.load(response)


def quiet_transformers() -> None:
    """No bars and no word of heads that are new, which here they are on purpose."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def new_reward_model(backbone: Path, folder: Path, seed: int = 0) -> Path:
    """A reward model with a head at random, for what does not depend on what it has learnt."""
    import torch
    from transformers import AutoTokenizer

    from rlhf_ray.reward.core.loading import head_of, load_reward_network

    tokenizer = AutoTokenizer.from_pretrained(backbone)
    tokenizer.chat_template = tokenizer.chat_template or _CHAT_TEMPLATE
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = load_reward_network(
            str(backbone),
            dtype="float32",
            pad_token_id=tokenizer.pad_token_id,
            attention="sdpa",
            new_head=True,
        )
        head = head_of(network)
        width = head.weight.shape[-1]
        torch.nn.init.normal_(head.weight, std=_HEAD_STD * (384 / width) ** 0.5)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def wait_for(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether a process has ended, which is waited for that long."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _request(url: str, token: str) -> urllib.request.Request:
    return urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})


def _scores(url: str, token: str) -> bool:
    request = _request(f"{url}/get_reward", token)
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, data=request_body("a text"), timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
