"""Named callers, whose tokens may change while the service runs, and nobody beyond this machine without one."""

from __future__ import annotations

import base64
import hmac
import json
import logging
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from fastapi import FastAPI

from rlhf_ray.config.serving import CandidateSettings, EndpointSettings, LimitSettings
from rlhf_ray.failures import BadInput
from rlhf_ray.reward.serve import auth
from rlhf_ray.reward.serve.auth import TOKEN_VARIABLE, Callers, is_loopback, read_callers, read_token
from rlhf_ray.reward.serve.front import Front, Fronted
from rlhf_ray.reward.serve.observations import Observer
from tests.loopback import serving
from tests.system.commands import wait_until

TOKEN, NEW, OTHER = "a-token-of-24-characters", "new-token-of-24-letters-x", "another-of-24-characters"
CALLERS = {"trainer": {"tokens": [TOKEN], "max_texts": 3}, "report.er-1": {"tokens": [OTHER]}}


@pytest.fixture(autouse=True)
def _no_token(monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The time that a token file is looked at."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(auth, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    write(path, CALLERS)
    return path


def write(path: Path, content: Any) -> None:
    """Replace a file, as an operator should."""
    new = path.with_suffix(".new")
    new.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    new.rename(path)


def callers_of(path: Path, unusable: Callable[[], object] = lambda: None) -> Callers:
    return Callers(partial(read_callers, EndpointSettings(token_file=str(path))), str(path), unusable)


def bearer(token: str) -> bytes:
    return f"Bearer {token}".encode()


def name_of(callers: Callers, token: str) -> str | None:
    caller = callers.find(bearer(token))
    return caller and caller.name


def basic(userinfo: str) -> bytes:
    return b"Basic " + base64.b64encode(userinfo.encode())


@pytest.mark.parametrize(
    "header",
    [bearer(TOKEN), f"bearer  {TOKEN} ".encode(), basic(f"x:{TOKEN}"), basic(f":{TOKEN}")],
)
def test_a_token_is_taken_as_bearer_and_as_password(header, tokens):
    caller = callers_of(tokens).find(header)
    assert caller is not None
    assert (caller.name, caller.max_texts) == ("trainer", 3)


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
def test_nothing_else_is(header, tokens):
    assert callers_of(tokens).find(header) is None


def test_every_token_is_compared_whichever_it_is(tokens, monkeypatch):
    callers = callers_of(tokens)
    compared: list[bytes] = []

    def compare(given: bytes, token: bytes) -> bool:
        compared.append(token)
        return hmac.compare_digest(given, token)

    monkeypatch.setattr(auth, "hmac", SimpleNamespace(compare_digest=compare))
    for given in (TOKEN, OTHER, "neither-of-the-two-tokens"):
        compared.clear()
        callers.find(bearer(given))
        assert compared == [TOKEN.encode(), OTHER.encode()]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_loopback_may_be_open(host):
    assert is_loopback(host)
    assert read_token(EndpointSettings(host=host)) is None
    assert Callers(lambda: read_callers(EndpointSettings(host=host))).is_open


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1"])
def test_other_addresses_need_a_token(host, monkeypatch, tmp_path):
    with pytest.raises(BadInput, match=r"endpoint\.host: .* can be reached from other machines"):
        read_callers(EndpointSettings(host=host))
    with pytest.raises(BadInput, match=r"endpoint\.host: .* can be reached from other machines"):
        read_callers(EndpointSettings(host="127.0.0.1"), host)
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert read_token(EndpointSettings(host=host)) == TOKEN
    path = tmp_path / "token"
    path.write_text(TOKEN[::-1] + "\n")
    assert read_token(EndpointSettings(host=host, token_file=str(path))) == TOKEN[::-1]


@pytest.mark.parametrize("token", ["", "short", "a token with blanks in it", "ünïcödé-of-enough-length"])
def test_a_token_that_is_none_is_refused(token, monkeypatch, tmp_path):
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    with pytest.raises(BadInput, match="at least 16"):
        read_callers(EndpointSettings())
    write(tmp_path / "token", token)
    with pytest.raises(BadInput, match="at least 16"):
        read_callers(EndpointSettings(token_file=str(tmp_path / "token")))


def test_a_missing_file_is_not_an_open_service(tmp_path):
    with pytest.raises(BadInput, match=r"endpoint\.token_file"):
        read_callers(EndpointSettings(token_file=str(tmp_path / "none")))


@pytest.mark.parametrize("line", ["1234567890123456", "0x12345678901234", "@a-token%with|signs", "sign:and:16:chars"])
def test_one_line_is_one_token_and_its_bearer_has_the_default_name(line, tmp_path):
    path = tmp_path / "token"
    write(path, line + "\n")
    assert name_of(callers_of(path), line) == "default"


def test_yaml_and_json_name_callers_and_values_are_taken_as_they_are_written(tmp_path):
    digits = "0" * 20
    for form in (json.dumps, yaml.safe_dump, partial(json.dumps, separators=(",", ":"))):
        path = tmp_path / "tokens"
        write(path, form({"one": {"tokens": [TOKEN, NEW]}, "two": {"tokens": [OTHER], "max_texts": 7}}))
        callers = callers_of(path)
        assert [name_of(callers, token) for token in (TOKEN, NEW, OTHER)] == ["one", "one", "two"]
        assert read_token(EndpointSettings(token_file=str(path))) == TOKEN
    write(path, f"one:\n  tokens: [{digits}, 1234567890123456]")
    assert [name_of(callers_of(path), token) for token in (digits, "1234567890123456")] == ["one", "one"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"one": {"tokens": ["secret"]}}, ["one.tokens.0: a token of 6 characters"]),
        ({"one": {"tokens": []}}, ["one.tokens: Tuple should have at least 1 item"]),
        ({"one": {"tokens": "secret-secret-secret"}}, ["one.tokens: Input should be a valid tuple"]),
        ({"one": "secret-secret-secret"}, ["one: Input should be a valid dictionary"]),
        ({"one": {"tokn": ["secret-secret-secret"]}}, ["one.tokens: Field required", "one.tokn: Extra inputs"]),
        (
            {"one": {"tokens": ["secret-secret-secret"], "max_texts": 0}},
            ["one.max_texts: ", "greater than or equal to 1"],
        ),
        ({"o ne": {"tokens": ["secret-secret-secret"]}}, ["o ne", "match pattern"]),
        ({name: {"tokens": ["secret-secret-secret"]} for name in ("a", "b")}, ["b: a token that a has too"]),
        ("{}", ["': Dictionary should have at least 1 item"]),
        ("one: {tokens: [secret-secret-secret]}\none: {tokens: [secret-2-secret-2]}", ["line 1: a key is there twice"]),
        ("one:\n  tokens: [secret-secret-secret", ["line 2: is not valid YAML"]),
        ("one:\n  tokens: [*secret-secret-secret]", ["line 2: is not valid YAML"]),
        ('{"one":{"tokens":["secret-secret-secret"', ["line 1: is not valid YAML"]),
        ("secret-secret-secret\nsecret-2-secret-2", ["is neither one token nor a mapping"]),
        ("one:\n  " + "[" * 5000, ["is neither one token nor a mapping"]),
        ("one:\x00\ntwo:", ["is neither one token nor a mapping"]),
    ],
)
def test_what_is_wrong_with_a_file_is_said_without_a_token(content, said, tokens):
    write(tokens, content)
    with pytest.raises(BadInput) as caught:
        callers_of(tokens)
    message = str(caught.value)
    assert caught.value.where == f"endpoint.token_file '{tokens}'"
    assert [part for part in said if part not in message] == []
    assert "secret" not in message
    assert caught.value.allowed
    assert "\n" not in message


def test_a_file_is_looked_at_once_a_second_and_read_when_it_has_changed(tokens, clock, monkeypatch):
    looks: list[str] = []
    stat = os.stat

    def counted(path: Any, **options: Any) -> os.stat_result:
        looks.append(str(path))
        return stat(path, **options)

    callers = callers_of(tokens)
    monkeypatch.setattr(auth.os, "stat", counted)
    write(tokens, {"trainer": {"tokens": [NEW]}})
    for _ in range(100):
        clock.now += 0.0099
        assert (name_of(callers, TOKEN), name_of(callers, NEW)) == ("trainer", None)
    clock.now += 0.0101
    assert (name_of(callers, TOKEN), name_of(callers, NEW)) == (None, "trainer")
    assert looks.count(str(tokens)) == 1
    before, content = stat(tokens), tokens.read_text().replace(NEW, NEW.upper())

    def overwritten() -> bool:
        """In place, with the time of its content set back; clocks of file systems are coarse."""
        tokens.write_text(content)
        os.utime(tokens, ns=(before.st_atime_ns, before.st_mtime_ns))
        return stat(tokens).st_ctime_ns != before.st_ctime_ns

    wait_until(overwritten, 10, "another time of the inode")
    clock.now += 1.01
    assert (name_of(callers, NEW), name_of(callers, NEW.upper())) == (None, "trainer")


def test_what_a_caller_has_under_way_counts_through_a_change_of_its_limit(tokens, clock):
    callers = callers_of(tokens)
    before = callers.find(bearer(TOKEN))
    assert before is not None
    with before.holding(2, 1):
        write(tokens, {"trainer": {"tokens": [NEW]}, "report.er-1": {"tokens": [OTHER], "max_texts": 5}})
        clock.now += 1
        after = callers.find(bearer(NEW))
        assert after is not None
        assert (after.texts, after.max_texts) == (2, math.inf)
    assert after.texts == 0
    other = callers.find(bearer(OTHER))
    assert other is not None
    assert other.max_texts == 5


def test_a_broken_file_keeps_the_tokens_of_before_and_says_so_once(tokens, clock, caplog):
    unusable: list[None] = []
    callers = callers_of(tokens, lambda: unusable.append(None))
    with caplog.at_level(logging.ERROR):
        for count, content in enumerate(["one:\n  tokens: [", {"trainer": {"tokens": ["short"]}}, None], start=1):
            if content is None:
                tokens.unlink()
            else:
                write(tokens, content)
            for _ in range(3):
                clock.now += 1
                assert name_of(callers, TOKEN) == "trainer"
            assert len(unusable) == len(caplog.messages) == count
            assert str(tokens) in caplog.messages[-1]
    assert "trainer.tokens.0: a token of 5 characters" in caplog.messages[1]
    write(tokens, {"trainer": {"tokens": [NEW]}})
    clock.now += 1
    assert (name_of(callers, TOKEN), name_of(callers, NEW), len(unusable)) == (None, "trainer", 3)


def test_a_token_is_rotated_without_a_refused_request(tokens, clock):
    app = FastAPI()
    app.post("/get_reward")(lambda: "scored")
    observer = Observer(CandidateSettings(), False)
    front = Front(observer, callers_of(tokens, observer.metrics.counters["token_file_errors"].inc), LimitSettings())

    with serving(Fronted(app, front)) as url:

        def statuses() -> list[int]:
            return [
                httpx.post(f"{url}/get_reward", headers={"Authorization": f"Bearer {token}"}).status_code
                for token in (TOKEN, NEW)
            ]

        assert statuses() == [200, 401]
        for content, found in (
            ({"trainer": {"tokens": [TOKEN, NEW]}}, [200, 200]),
            ({"trainer": {"tokens": [NEW]}}, [401, 200]),
            ("half of a fi", [401, 200]),
        ):
            write(tokens, content)
            clock.now += 1
            assert statuses() == found
    assert observer.metrics.counters["token_file_errors"]._value.get() == 1
