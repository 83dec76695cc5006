"""Requests that no client should send, at the reward service: `python -m bench.serve_fuzz --schemathesis FOLDER`

Two sources: schemathesis, from the service's own OpenAPI, valid and invalid bodies of every operation; and
`bench.fuzz_cases` over plain sockets, for what a well-behaved HTTP library refuses to send. Whatever is sent:

- every request is answered in time;
- an answer of 500 or more is a typed 503 or 504;
- every error is a JSON envelope with a type, without a stack trace and without the text that was sent;
- nothing but 401 is answered without the token;
- the score of a known text stays bit-for-bit the same throughout.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httptools

from bench.fuzz_cases import SECRET, CaseMaker, FuzzCase
from bench.load import request_body
from bench.results import Result, publish
from bench.service import free_port, running_server, serve_command, write_config

DEADLINE_S = 40.0
CONNECTIONS = 32
KNOWN_EVERY = 2000
TOKEN = "a-token-for-fuzzing"
_SHOWN = 5
_RESET_BYTES = 1 << 18
"""A server that refuses a body unread closes the connection, and a client still sending may lose the answer."""
_TRACE = re.compile(rb'Traceback|File "|site-packages|\.py\b')
_OVERLOAD = {503, 504}


@dataclass
class Reply:
    """An answer as it comes in; httptools calls the methods."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""
    begun: bool = False
    head_read: bool = False
    whole: bool = False
    status: int = 0

    def on_message_begin(self) -> None:
        self.begun = True

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self.head_read = True

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.whole = True


class Socket:
    """One client that sends bytes and reads an answer, on a connection that it keeps while it can."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, case: FuzzCase) -> Reply | None:
        """What is answered; None if the connection is closed instead.

        Raises:
            TimeoutError: neither came in time.
        """
        async with asyncio.timeout(DEADLINE_S):
            kept = self._streams is not None
            reply = await self._exchange(case)
            if reply is None and kept and case.answer != "none":
                # A kept connection may be closed by its other end at any time: that says nothing of the request.
                reply = await self._exchange(case)
            return reply

    async def _exchange(self, case: FuzzCase) -> Reply | None:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        reply = Reply()
        parser = httptools.HttpResponseParser(reply)
        done = False
        try:
            writer.write(case.data)
            if case.answer == "none":
                return None
            while not done:
                data = await reader.read(1 << 16)
                if not data:
                    return None
                parser.feed_data(data)
                done = reply.whole or (reply.head_read and not case.has_body)
            reply.status = parser.get_status_code()
            done = case.answer == "typed" and case.has_body and parser.should_keep_alive()
            return reply
        except (ConnectionError, httptools.HttpParserError):
            done = False
            return None
        finally:
            if not done:
                self.close()

    def close(self) -> None:
        """Drop the connection, whatever is under way."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


@dataclass
class Findings:
    """What was sent and what was wrong with the answers.

    Attributes:
        kinds, statuses: requests by what was wrong with them, and by what came back.
        violations: by rule.
        examples: of each, a few.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    violations: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, status: str, violation: str, example: str) -> None:
        """Count one request.

        Args:
            violation: the rule that its answer broke, or empty.
        """
        self.kinds[kind] += 1
        self.statuses[status] += 1
        if violation:
            self.violations[violation] += 1
            shown = self.examples.setdefault(violation, [])
            if len(shown) < _SHOWN:
                shown.append(f"{kind}: {example}")


RULES = (
    "no answer in time",
    "connection closed without an answer",
    "status 500 or more that is no typed overload",
    "stack trace",
    "error that is not a typed envelope",
    "text repeated in an error",
    "a status that this request may not have",
    "score that is not JSON",
    "another score for the known text",
)


def violation_of(
    status: int, media_type: bytes, body: bytes, *, typed: bool, has_body: bool, secrets: tuple[bytes, ...]
) -> str:
    """The rule that an answer breaks, or nothing.

    Args:
        typed: an error must be in an envelope; otherwise a proxy's own page will do.
        secrets: what no error may repeat.
    """
    if status >= 400 and _TRACE.search(body):
        return "stack trace"
    content = _json(body) if has_body else {}
    is_envelope = not has_body or _is_envelope(content)
    if status >= 500 and not (status in _OVERLOAD and is_envelope) and (typed or status not in (501, 505)):
        return "status 500 or more that is no typed overload"
    if status >= 400 and typed and not is_envelope:
        return "error that is not a typed envelope"
    if status >= 400 and any(secret in body for secret in secrets):
        return "text repeated in an error"
    if status == 200 and has_body and media_type.startswith(b"application/json") and content is None:
        return "score that is not JSON"
    return ""


def _json(body: bytes) -> Any:
    """The content of a body; None where it is not JSON (which knows no NaN)."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None


def _is_envelope(content: Any) -> bool:
    """Whether an error says its type: ours and OpenAI's in an object, Text Embeddings Inference's beside it."""
    if not isinstance(content, dict):
        return False
    error = content.get("error")
    if isinstance(error, dict):
        return isinstance(error.get("type"), str) and isinstance(error.get("message"), str)
    return isinstance(error, str) and isinstance(content.get("error_type"), str)


class SocketFuzzer:
    """`bench.fuzz_cases` over plain sockets.

    Args:
        port: of the service on loopback.
        findings: where the requests are counted.
    """

    def __init__(self, port: int, findings: Findings, seed: int) -> None:
        self._port = port
        self._findings = findings
        self._maker = CaseMaker(seed, TOKEN)
        self._next = 0
        self._known: float | None = None

    async def run(self, requests: int) -> None:
        """Send so many, on all connections."""
        await self._score_known()

        async def client() -> None:
            socket = Socket(self._port)
            while self._next < requests:
                number, self._next = self._next, self._next + 1
                await self._send(socket, self._maker.case(number))
                if number % KNOWN_EVERY == 0:
                    await self._score_known()
            socket.close()

        await asyncio.gather(*(client() for _ in range(CONNECTIONS)))
        await self._score_known()

    async def _send(self, socket: Socket, case: FuzzCase) -> None:
        status, violation, body = "closed", "", b""
        try:
            reply = await socket.send(case)
        except (TimeoutError, OSError) as error:
            status, reply = type(error).__name__, None
            socket.close()
            violation = "no answer in time"
        if reply is not None:
            status, body = str(reply.status), reply.body
            secrets = (SECRET.encode(),)
            media_type = reply.headers.get(b"content-type", b"")
            violation = violation_of(
                reply.status,
                media_type,
                body,
                typed=case.answer == "typed",
                has_body=case.has_body,
                secrets=secrets,
            )
            if not violation and case.statuses and reply.status not in case.statuses:
                violation = "a status that this request may not have"
        elif not violation and case.answer == "typed" and len(case.data) < _RESET_BYTES:
            violation = "connection closed without an answer"
        self._findings.add(case.kind, status, violation, f"{case.data[:300]!r} -> {status} {body[:300]!r}")

    async def _score_known(self) -> None:
        """A known text, again until there is room for it."""
        data = request_body("A text that is known.")
        head = f"POST /get_reward HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        socket = Socket(self._port)
        started = time.perf_counter()
        while True:
            reply = await socket.send(FuzzCase("known text", head.encode() + data))
            if reply is None or reply.status not in _OVERLOAD or time.perf_counter() - started > DEADLINE_S:
                break
            await asyncio.sleep(1.0)
        socket.close()
        score = json.loads(reply.body)["rewards"][0] if reply is not None and reply.status == 200 else None
        self._known = score if self._known is None else self._known
        wrong = "another score for the known text" if score is None or score != self._known else ""
        status = "closed" if reply is None else str(reply.status)
        self._findings.add("known text", status, wrong, f"{score} for {self._known}")


def schemathesis_requests(url: str, requests: int, folder: Path, findings: Findings) -> None:
    """Requests from the service's OpenAPI, valid and invalid ones in turn.

    Args:
        folder: that schemathesis was installed into.
    """
    # Behind everything else: what the folder brings along besides schemathesis must not replace what is there.
    sys.path.append(str(folder.absolute()))
    import requests as client
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis.generation import GenerationMode

    headers = {"Authorization": f"Bearer {TOKEN}"}
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=headers)
    operations = [found.ok() for found in schema.get_all_operations()]
    session = client.Session()
    sent = 0

    def send(case: Any) -> None:
        nonlocal sent
        sent += 1
        kind = f"schemathesis {case.method} {case.operation.path}"
        secrets = tuple(text.encode() for text in _texts(case.body) if len(text) >= 16)
        status, violation, body = "closed", "connection closed without an answer", b""
        try:
            reply = case.call(base_url=url, session=session, headers=headers, timeout=DEADLINE_S, allow_redirects=False)
        except client.Timeout:
            violation = "no answer in time"
        except (client.exceptions.InvalidHeader, client.exceptions.InvalidURL, UnicodeError):
            status, violation = "not sendable", ""
        except client.RequestException as error:
            body = str(error).encode()
        else:
            status, body = str(reply.status_code), reply.content
            media_type = ",".join(reply.headers.get("content-type", [])).encode()
            violation = violation_of(
                reply.status_code, media_type, body, typed=True, has_body=case.method != "HEAD", secrets=secrets
            )
        example = f"{str(case.body)[:300]!r} -> {status} {body[:300]!r}"
        findings.add(kind, status, violation, example)

    number = 0
    while sent < requests:
        # Operations without a body have few examples: the others make up for them in further rounds.
        each = max((requests - sent) // (2 * len(operations)), 20)
        for operation in operations:
            for mode in GenerationMode:
                number += 1
                examples = seed(number)(
                    settings(
                        max_examples=each,
                        database=None,
                        deadline=None,
                        phases=[Phase.generate],
                        suppress_health_check=list(HealthCheck),
                    )(given(case=operation.as_strategy(generation_mode=mode))(send))
                )
                try:
                    examples()
                except Unsatisfiable:
                    # Nothing of this operation can be made invalid.
                    continue


def _texts(body: Any) -> Iterator[str]:
    """All strings among the values of a body."""
    if isinstance(body, str):
        yield body
    elif isinstance(body, dict):
        for value in body.values():
            yield from _texts(value)
    elif isinstance(body, list):
        for value in body:
            yield from _texts(value)


def fuzz_results(findings: Findings, seconds: float, socket_rate: float) -> list[Result]:
    """A number for each rule."""
    total = findings.kinds.total()
    results = [
        Result("requests", total, target=">= 200000"),
        Result("time", seconds, "s"),
        Result("over plain sockets", socket_rate, "requests/s"),
    ]
    results += [Result(f"violations: {rule}", findings.violations[rule], target="<= 0") for rule in RULES]
    results += [Result(f"sent: {kind}", count) for kind, count in sorted(findings.kinds.items())]
    return results + [Result(f"answered: {status}", count) for status, count in sorted(findings.statuses.items())]


@contextmanager
def _service(data: Path) -> Iterator[int]:
    """The service with a token and a tiny model, and its port."""
    port = free_port()
    with TemporaryDirectory() as name:
        folder = Path(name)
        token = folder / "token"
        token.write_text(TOKEN, encoding="utf-8")
        token.chmod(0o600)
        config = write_config(
            folder / "fuzz.yaml",
            [{"name": "reward", "path": str((data / "tiny" / "reward_model").absolute())}],
            port,
            endpoint={"port": port, "token_file": str(token)},
            scorer={"threads": 1, "batch_invariant": True},
            limits={"deadline_s": 20.0},
        )
        with running_server(serve_command(config), port, token=TOKEN):
            yield port


def main() -> None:
    parser = argparse.ArgumentParser(description="Requests that no client should send, at the reward service.")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with tiny")
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--schemathesis", type=Path, help="folder that schemathesis was installed into (pip --target)")
    parser.add_argument("--schemathesis-requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, help=f"of a service that runs on loopback, with the token '{TOKEN}'")
    arguments = parser.parse_args()
    import uvloop

    findings = Findings()
    started = time.perf_counter()

    def fuzz(port: int) -> float:
        if arguments.schemathesis is not None:
            wanted = arguments.schemathesis_requests
            schemathesis_requests(f"http://127.0.0.1:{port}", wanted, arguments.schemathesis, findings)
        sent, since = findings.kinds.total(), time.perf_counter()
        uvloop.run(SocketFuzzer(port, findings, arguments.seed).run(max(arguments.requests - sent, 0)))
        return (findings.kinds.total() - sent) / (time.perf_counter() - since)

    if arguments.port is not None:
        socket_rate = fuzz(arguments.port)
    else:
        with _service(arguments.data) as port:
            socket_rate = fuzz(port)
    for rule, examples in findings.examples.items():
        print(f"{rule}:", *examples, sep="\n    ")
    publish("serve_fuzz", fuzz_results(findings, time.perf_counter() - started, socket_rate))


if __name__ == "__main__":
    main()
