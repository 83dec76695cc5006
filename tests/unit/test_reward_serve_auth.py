"""One token, and nobody beyond this machine without it."""

from __future__ import annotations

import base64

import pytest

from rlhf_ray.config.serving import EndpointSettings
from rlhf_ray.failures import BadInput
from rlhf_ray.reward.serve.auth import TOKEN_VARIABLE, is_authorized, is_loopback, read_token

TOKEN = "a-token-of-24-characters"


@pytest.fixture(autouse=True)
def _no_token(monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


def basic(userinfo: str) -> bytes:
    return b"Basic " + base64.b64encode(userinfo.encode())


@pytest.mark.parametrize(
    "header",
    [f"Bearer {TOKEN}".encode(), f"bearer  {TOKEN} ".encode(), basic(f"x:{TOKEN}"), basic(f":{TOKEN}")],
)
def test_the_token_is_taken_as_bearer_and_as_password(header):
    assert is_authorized(header, TOKEN)


@pytest.mark.parametrize(
    "header",
    [
        None,
        b"",
        TOKEN.encode(),
        b"Bearer ",
        b"Bearer " + TOKEN.encode()[:-1],
        b"Bearer " + TOKEN.encode() + b"x",
        basic(TOKEN),
        basic(f"{TOKEN}:x"),
        b"Basic !!!",
        b"Basic \xff\xfe",
        b"Bearer \xff",
    ],
)
def test_nothing_else_is(header):
    assert not is_authorized(header, TOKEN)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_loopback_may_be_open(host):
    assert is_loopback(host)
    assert read_token(EndpointSettings(host=host)) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1"])
def test_other_addresses_need_a_token(host, monkeypatch, tmp_path):
    with pytest.raises(BadInput, match=r"endpoint\.host: .* can be reached from other machines"):
        read_token(EndpointSettings(host=host))
    with pytest.raises(BadInput, match=r"endpoint\.host: .* can be reached from other machines"):
        read_token(EndpointSettings(host="127.0.0.1"), host)
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert read_token(EndpointSettings(host=host)) == TOKEN
    path = tmp_path / "token"
    path.write_text(TOKEN[::-1] + "\n")
    assert read_token(EndpointSettings(host=host, token_file=str(path))) == TOKEN[::-1]


@pytest.mark.parametrize("token", ["", "short", "a token with blanks in it", "ünïcödé-of-enough-length"])
def test_a_token_that_is_none_is_refused(token, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    with pytest.raises(BadInput, match="at least 16"):
        read_token(EndpointSettings())


def test_a_missing_file_is_not_an_open_service(tmp_path):
    with pytest.raises(BadInput, match=r"endpoint\.token_file"):
        read_token(EndpointSettings(token_file=str(tmp_path / "none")))
