"""Who may ask: callers with tokens, whom a file may name, or nobody beyond this machine."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from rlhf_ray.config.serving import SHORTEST_TOKEN, CallerName, CallerSettings, EndpointSettings
from rlhf_ray.failures import BadInput
from rlhf_ray.reward.serve.context import Caller

TOKEN_VARIABLE = "RLHF_RAY_TOKEN"
_LOOK_S = 1.0
"""How often it is seen whether the token file has changed."""
_CALLERS: TypeAdapter[dict[str, CallerSettings]] = TypeAdapter(
    Annotated[dict[CallerName, CallerSettings], Field(min_length=1)]
)
_ALLOWED = (
    f"tokens of at least {SHORTEST_TOKEN} printable characters, such as `openssl rand -hex 24` prints: one alone, or "
    "`NAME: {tokens: [TOKEN, …], max_texts: NUMBER}` for each caller, where max_texts may be left out"
)

logger = logging.getLogger(__name__)


def read_callers(settings: EndpointSettings, host: str | None = None) -> dict[str, CallerSettings]:
    """The callers of the file or the environment, by name; none where the service is open, which only loopback may be.

    Args:
        host: where the service really listens, where that may be elsewhere than the settings say.

    Raises:
        BadInput: the file or a token in it cannot be used, or there is no token and others could reach the service.
    """
    if settings.token_file is not None:
        where = f"endpoint.token_file '{settings.token_file}'"
        try:
            text = Path(settings.token_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(where, f"cannot be read ({error})", "a file with a token") from None
        return _checked(where, _parsed(where, text))
    token = os.environ.get(TOKEN_VARIABLE)
    if token is not None:
        return _checked(f"environment variable {TOKEN_VARIABLE}", _one(token))
    host = host or settings.host
    if not is_loopback(host):
        raise BadInput(
            "endpoint.host",
            f"'{host}' can be reached from other machines and there is no token",
            f"endpoint.token_file or {TOKEN_VARIABLE}, or a loopback address",
        )
    return {}


def read_token(settings: EndpointSettings) -> str | None:
    """The token that commands bring which ask the service themselves; None where it is open.

    Raises:
        BadInput: as `read_callers`.
    """
    return next((caller.tokens[0] for caller in read_callers(settings).values()), None)


class Callers:
    """Who may ask now. The token file is read again when it has changed; where that cannot be used, the tokens of
    before stay good.

    Args:
        read: those of this moment.
        token_file: where they are from; None where they do not change.
        unusable: told of each change that cannot be used.

    Raises:
        BadInput: of the first reading.
    """

    def __init__(
        self,
        read: Callable[[], Mapping[str, CallerSettings]],
        token_file: str | None = None,
        unusable: Callable[[], object] = lambda: None,
    ) -> None:
        self._read, self._token_file, self._unusable = read, token_file, unusable
        # Before it is read: what is written meanwhile is a change.
        self._seen, self._look_at = self._state(), time.monotonic() + _LOOK_S
        self._callers: dict[str, Caller] = {}
        self._tokens: list[tuple[bytes, Caller]] = []
        self._take(read())

    @property
    def is_open(self) -> bool:
        """Whether nobody needs a token."""
        return not self._tokens

    def find(self, header: bytes | None) -> Caller | None:
        """Whose token an `Authorization` header brings: as Bearer, or as Basic's password (URL user info)."""
        self._look()
        given = _given(header)
        found: Caller | None = None
        # All are compared: how long it takes says nothing of which it was.
        for token, caller in self._tokens:
            if hmac.compare_digest(given, token):
                found = caller
        return found

    def _look(self) -> None:
        now = time.monotonic()
        if self._token_file is None or now < self._look_at:
            return
        before, self._seen, self._look_at = self._seen, self._state(), now + _LOOK_S
        if self._seen == before:
            return
        try:
            self._take(self._read())
        except BadInput as error:
            logger.error("the tokens of before stay good: %s", error)
            self._unusable()
        else:
            logger.info("the token file was read again: %s", ", ".join(self._callers))

    def _state(self) -> tuple[int, ...] | None:
        """Something else after every change. A copy may bring the time of its content along, but not of its inode."""
        try:
            status = os.stat(self._token_file or "")
        except OSError:
            return None
        return status.st_ino, status.st_ctime_ns, status.st_size

    def _take(self, callers: Mapping[str, CallerSettings]) -> None:
        """Have these callers, with what those have under way who were there before."""
        before, self._callers, self._tokens = self._callers, {}, []
        for name, settings in callers.items():
            caller = self._callers[name] = before.get(name) or Caller(name)
            caller.max_texts = settings.max_texts or math.inf
            self._tokens += [(token.encode(), caller) for token in settings.tokens]


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can reach an address.

    Raises:
        BadInput: there is no such address.
    """
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise BadInput("endpoint.host", f"'{host}' is no address ({error})", "an address of this machine") from None
    return all(ipaddress.ip_address(str(address).split("%")[0]).is_loopback for address in addresses)


def _given(header: bytes | None) -> bytes:
    scheme, _, value = (header or b"").strip().partition(b" ")
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return value.strip() if scheme.lower() == b"bearer" else b""


class _Loader(yaml.BaseLoader):
    """Takes every value as it is written: a token of digits is no number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            # YAML would take the last of them and say nothing.
            raise yaml.constructor.ConstructorError(None, None, "a key is there twice", node.start_mark)
        return mapping


def _one(token: str) -> dict[str, Any]:
    return {"default": {"tokens": [token]}}


def _parsed(where: str, text: str) -> Any:
    """The document of a file, as `CallerSettings` by name but unchecked.

    Raises:
        BadInput: it is neither one token nor such a document. No message quotes it: that may be a token.
    """
    found = "is neither one token nor a mapping"
    try:
        document = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        problem = error.problem if isinstance(error, yaml.constructor.ConstructorError) else "is not valid YAML"
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        document, found = None, f"line {line}: {problem}"
    except (yaml.YAMLError, RecursionError):
        document = None
    if isinstance(document, dict):
        return document
    # Half a file of callers is no token.
    if "\n" in text or text.startswith("{"):
        raise BadInput(where, found, _ALLOWED)
    return _one(text)


def _checked(where: str, document: Any) -> dict[str, CallerSettings]:
    try:
        callers = _CALLERS.validate_python(document)
    except ValidationError as error:
        # Without the input, which may be a token.
        problems = [(".".join(map(str, each["loc"])), each["msg"]) for each in error.errors(include_input=False)]
        found = ", ".join(": ".join(filter(None, problem)) for problem in problems).replace("Value error, ", "")
        raise BadInput(where, found, _ALLOWED) from None
    owners: dict[str, str] = {}
    for name, caller in callers.items():
        for token in caller.tokens:
            if (owner := owners.setdefault(token, name)) != name:
                raise BadInput(where, f"{name}: a token that {owner} has too", "each token under one name")
    return callers
