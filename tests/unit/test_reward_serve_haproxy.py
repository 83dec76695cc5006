"""HAProxy keeps its own pages to the machine, and the service at the address that it was given."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from ray.serve._private.haproxy import HAProxyApi, HAProxyConfig
from ray.serve.config import HTTPOptions

from rlhf_ray.reward.serve.haproxy import BINARY_VARIABLE, write_program


@pytest.mark.parametrize(
    ("host", "listens"), [("0.0.0.0", "*:8000"), ("127.0.0.1", "127.0.0.1:8000"), ("10.0.0.7", "10.0.0.7:8000")]
)
def test_only_the_pages_of_haproxy_move_to_loopback(
    host: str, listens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    haproxy = tmp_path / "haproxy"
    haproxy.write_text('#!/bin/sh\ncat "$2"\n')
    haproxy.chmod(0o755)
    monkeypatch.setenv(BINARY_VARIABLE, str(haproxy))
    write_program(tmp_path / "private")
    made_by_serve = HAProxyApi(
        HAProxyConfig(
            http_options=HTTPOptions(host=host, port=8000),
            socket_path=f"{tmp_path}/admin.sock",
            metrics_port=9101,
            stats_port=8404,
        ),
        config_file_path=f"{tmp_path}/haproxy.cfg",
    )
    made_by_serve._generate_config_file_internal()
    command = [str(tmp_path / "private"), "-f", f"{tmp_path}/haproxy.cfg"]
    config = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert re.findall(r"^ *bind (\S+)", config, re.M) == ["127.0.0.1:9101", listens, "127.0.0.1:8404"]
    assert re.findall(r"stats socket \S+ mode (\d+)", config) == ["600"]
