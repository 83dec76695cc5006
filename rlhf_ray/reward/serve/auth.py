"""Who may ask: one bearer token, or nobody beyond this machine."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import os
import socket
from pathlib import Path

from rlhf_ray.config.serving import EndpointSettings
from rlhf_ray.failures import BadInput

TOKEN_VARIABLE = "RLHF_RAY_TOKEN"
_SHORTEST = 16


def read_token(settings: EndpointSettings, host: str | None = None) -> str | None:
    """The token of the file or the environment; None where the service is open, which only loopback may be.

    Args:
        host: where the service really listens, where that may be elsewhere than the settings say.

    Raises:
        BadInput: the file cannot be read, the token is too short, or there is none and others could reach the service.
    """
    where, token = f"environment variable {TOKEN_VARIABLE}", os.environ.get(TOKEN_VARIABLE)
    if settings.token_file is not None:
        where = "endpoint.token_file"
        try:
            token = Path(settings.token_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(where, f"'{settings.token_file}' cannot be read ({error})", "a file with a token") from None
    if token is not None:
        if len(token) < _SHORTEST or not token.isascii() or not token.isprintable() or " " in token:
            raise BadInput(
                where,
                f"the token has {len(token)} characters, or others than printable ASCII",
                f"at least {_SHORTEST} printable characters, such as `openssl rand -hex 24` prints",
            )
        return token
    host = host or settings.host
    if not is_loopback(host):
        raise BadInput(
            "endpoint.host",
            f"'{host}' can be reached from other machines and there is no token",
            f"endpoint.token_file or {TOKEN_VARIABLE}, or a loopback address",
        )
    return None


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


def is_authorized(header: bytes | None, token: str) -> bool:
    """Whether an `Authorization` header brings the token: as Bearer, or as Basic's password (URL user info)."""
    scheme, _, value = (header or b"").strip().partition(b" ")
    given = b""
    if scheme.lower() == b"bearer":
        given = value.strip()
    elif scheme.lower() == b"basic":
        try:
            given = base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return False
    return hmac.compare_digest(given, token.encode())
