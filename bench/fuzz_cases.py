"""Requests that no client should send, each drawn from its number: the same number, the same bytes.

Most are valid HTTP with a body that is wrong in one way. Some are wrong HTTP: there a closed connection, or an error
without our envelope from the proxy in front, is a fair answer.
"""

from __future__ import annotations

import json
import string
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rlhf_ray.randomness import keyed_generator

SECRET = "qz7secretwq"
"""In every text that is to be scored; no error may repeat it."""
_HUGE_TEXTS = 100_000
_MANY_TEXTS = 3_000

BODIES: tuple[tuple[str, Callable[[str], Any]], ...] = (
    ("/get_reward", lambda text: {"query": [text], "prompts": [text], "labels": [None]}),
    ("/get_reward", lambda text: {"query": [text, text], "prompts": [text, text], "labels": ["a", 1]}),
    ("/get_reward", lambda text: {"query": [], "prompts": [], "labels": []}),
    ("/slime", lambda text: {"prompt": text, "response": text, "label": None}),
    ("/classify", lambda text: {"model": "reward", "input": text, "use_activation": False}),
    ("/classify", lambda text: {"model": "reward", "input": [text, text], "truncate_prompt_tokens": 8}),
    ("/classify", lambda text: {"model": "reward", "input": [[1, 2, 3], [4]]}),
    ("/classify", lambda text: {"model": "reward", "messages": _turns(text)}),
    ("/classify", lambda text: {"model": "reward", "text": [text]}),
    ("/pooling", lambda text: {"model": "reward", "input": text, "task": "classify"}),
    ("/v1/embeddings", lambda text: {"model": "reward", "input": text}),
    ("/score", lambda text: {"model": "reward", "queries": text, "documents": [text, text]}),
    ("/v1/score", lambda text: {"model": "reward", "text_1": [text], "text_2": [text]}),
    ("/rerank", lambda text: {"model": "reward", "query": text, "documents": [text], "top_n": 1}),
    ("/v2/rerank", lambda text: {"model": "reward", "query": text, "documents": [text]}),
    ("/rerank", lambda text: {"query": text, "texts": [text, text], "raw_scores": True, "return_text": False}),
    ("/predict", lambda text: {"inputs": text, "raw_scores": False}),
    ("/predict", lambda text: {"inputs": [[text], [text, text]], "truncate": True, "truncation_direction": "Left"}),
    ("/v1/chat/completions", lambda text: {"model": "reward", "messages": _turns(text)}),
    ("/v1/reward", lambda text: {"items": [{"prompt": text, "response": text}], "on_too_long": "truncate"}),
    ("/v1/reward", lambda text: {"model": "reward", "items": [{"text": text}, {"messages": _turns(text)}]}),
    ("/v1/reward", lambda text: {"items": [{"token_ids": [1, 2, 3]}]}),
    ("/v1/preference", lambda text: {"items": [{"prompt": text, "response_a": text, "response_b": text}]}),
)
PATHS = tuple(dict.fromkeys(path for path, _ in BODIES))
GET_PATHS = ("/v1/models", "/info", "/metrics", "/openapi.json", "/v1/service", "/")

_NUMBERS = [b"1e400", b"-1e400", b"1e-400", b"1e999999999", b"NaN", b"Infinity", b"-Infinity", b"-0", b"-0.0", b"1.0"]
_NUMBERS += [b"0.5", b"-1", b"18446744073709551616", b"9223372036854775808", b"-2147483649", b"01", b"0x10", b"1_000"]
_NUMBERS += [b"9" * 5000, b"-" + b"9" * 5000, b"1" + b"0" * 400 + b".5", b"0." + b"0" * 5000 + b"1"]

_MEDIA_TYPES = [b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data", b"application/xml", b";;;"]
_MEDIA_TYPES += [b"application/json; charset=x", b"application/json; charset=utf-16", b"multipart/form-data; boundary="]
_MEDIA_TYPES += [b"", b"a" * 200, b"application/json, application/json", b"image/png"]

_CREDENTIALS = [None, b"", b"Bearer", b"Bearer ", b"Bearer wrong", b"Bearer " + b"a" * 4000, b"bearer  \xc3\xbc"]
_CREDENTIALS += [b"Basic", b"Basic !!!", b"Basic " + b64encode(b"x:wrong"), b"Basic " + b64encode(b"\xff:\xfe")]
_CREDENTIALS += [b"Basic " + b64encode(b"wrong"), b"Digest a=b"]

_HEADERS = [(b"X-Request-Id", b"a" * 3000), (b"X-Request-Id", b"\x01\x02"), (b"X-Request-Id", "ü".encode())]
_HEADERS += [(b"X-Huge", b"h" * 70_000), (b"Bad Name", b"1"), (b"", b"1"), (b"Accept", b"*/*;q=x"), (b"Host", b"a, b")]
_HEADERS += [
    (b"Accept-Encoding", b"gzip, br, \xff"),
    (b"Cookie", b"a=b;" * 500),
    (b"X-Forwarded-For", b"1.2.3.4, \x7f"),
]
_HEADERS += [(b"Upgrade", b"websocket"), (b"Connection", b"close, x")]

_VALUES: list[Any] = [None, True, False, 0, -1, 2**40, 0.5, "", SECRET, "-1", "x" * 20_000, "\ud800", "\x00"]
_VALUES += [[], [[]], {}, {"a": {}}, [None], [""], [1, "a", None], ["a", ["b"]], [[SECRET] * 3], {"role": "user"}]
_NAMES = [
    "model",
    "text",
    "input",
    "messages",
    "use_activation",
    "truncate_prompt_tokens",
    "on_too_long",
    "stream",
    "n",
]
_NAMES += ["add_special_tokens", "truncation_side", "top_n", "templated", "chat_template", "unknown"]


@dataclass(frozen=True)
class FuzzCase:
    """One request.

    Attributes:
        kind: what is wrong with it.
        data: its bytes.
        answer: what must come back. `typed`: a score, or an error in an envelope; `any`: an answer or a closed
            connection; `none`: nothing can come, the request is left unfinished.
        statuses: the only ones allowed; empty: whatever the envelope says.
        has_body: whether its answer has one (not for HEAD).
    """

    kind: str
    data: bytes
    answer: Literal["typed", "any", "none"] = "typed"
    statuses: tuple[int, ...] = ()
    has_body: bool = True


class CaseMaker:
    """Requests by number.

    Args:
        seed: of all draws.
        token: that lets a request in.
    """

    def __init__(self, seed: int, token: str) -> None:
        self._seed = seed
        self._token = token
        kinds: dict[Callable[[np.random.Generator], FuzzCase], float] = {
            self._valid: 4,
            self._mutated: 24,
            self._broken_json: 18,
            self._deep: 4,
            self._numbers: 12,
            self._encodings: 12,
            self._media_types: 5,
            self._lengths: 4,
            self._chunked: 4,
            self._batches: 2.5,
            self._huge_batches: 0.02,
            self._endless: 0.02,
            self._slow: 0.02,
            self._no_text: 3,
            self._paths: 6,
            self._headers: 3,
            self._strangers: 5,
        }
        self._kinds = list(kinds)
        self._edges = np.cumsum(list(kinds.values())) / sum(kinds.values())

    def case(self, number: int) -> FuzzCase:
        """The request of that number."""
        random = keyed_generator(self._seed, "fuzz", number)
        kind = int(np.searchsorted(self._edges, random.random(), side="right"))
        return self._kinds[min(kind, len(self._kinds) - 1)](random)

    def _valid(self, random: np.random.Generator) -> FuzzCase:
        path, body = _body(random)
        # 422 and 424: a model without a chat template, or with another vocabulary, takes no messages or tokens.
        return FuzzCase("valid", self._post(path, _dumps(body)), statuses=(200, 400, 422, 424, 429, 503, 504))

    def _mutated(self, random: np.random.Generator) -> FuzzCase:
        path, body = _body(random)
        for _ in range(int(random.integers(1, 4))):
            body = _mutate(body, random)
        return FuzzCase("mutated body", self._post(path, _dumps(body)))

    def _broken_json(self, random: np.random.Generator) -> FuzzCase:
        path, body = _body(random)
        data = bytearray(_dumps(body))
        for _ in range(int(random.integers(1, 6))):
            place = int(random.integers(len(data))) if data else 0
            change = random.integers(4)
            if change == 0:
                data[place : place + 1] = bytes(random.integers(0, 256, 1, dtype=np.uint8))
            elif change == 1:
                del data[place : place + int(random.integers(1, 8))]
            elif change == 2:
                data[place:place] = _pick(random, (b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\x00", b"//"))
            else:
                del data[place:]
        return FuzzCase("malformed JSON", self._post(path, bytes(data)))

    def _deep(self, random: np.random.Generator) -> FuzzCase:
        path, body = _body(random)
        depth = int(10 ** random.uniform(1, 5))
        opening, closing = _pick(random, ((b"[", b"]"), (b'{"a":', b"}"), (b'[{"query":', b"}]")))
        nest = opening * depth + b"1" + closing * depth * int(random.integers(2))
        data = nest if random.integers(2) else _dumps(_replace_one(body, "@nest@", random)).replace(b'"@nest@"', nest)
        return FuzzCase("deep nesting", self._post(path, data))

    def _numbers(self, random: np.random.Generator) -> FuzzCase:
        path, body = _body(random)
        number = _pick(random, _NUMBERS)
        data = _dumps(_replace_one(body, "@number@", random)).replace(b'"@number@"', number)
        return FuzzCase("huge and odd numbers", self._post(path, data))

    def _encodings(self, random: np.random.Generator) -> FuzzCase:
        path, make = BODIES[int(random.integers(len(BODIES)))]
        text = f"Zoë naïve 漢字 \U0001f600 {SECRET}"
        whole = json.dumps(make(text), ensure_ascii=False)
        way = random.integers(8)
        if way < 4:
            name = ("latin-1", "utf-16", "utf-16-be", "utf-32")[way]
            return FuzzCase("wrong encoding", self._post(path, whole.encode(name, "replace")))
        if way == 4:
            return FuzzCase("wrong encoding", self._post(path, b"\xef\xbb\xbf" + whole.encode()))
        raw = (rb"\ud800", rb"\udc00\ud800", b"\xed\xa0\x80", b"\xc0\xaf", b"\xff\xfe", rb"\u0000", b"\x00", b"\x1b[2J")
        odd = raw[int(random.integers(len(raw)))]
        return FuzzCase("wrong encoding", self._post(path, whole.encode().replace(b"na", odd)))

    def _media_types(self, random: np.random.Generator) -> FuzzCase:
        path, body = _body(random)
        media_type = _pick(random, _MEDIA_TYPES)
        headers = [(b"Content-Encoding", b"gzip")] if random.integers(5) == 0 else []
        data = b"" if random.integers(6) == 0 else _dumps(body)
        return FuzzCase("content type", self._post(path, data, headers, media_type))

    def _lengths(self, random: np.random.Generator) -> FuzzCase:
        path, body = _body(random)
        data = _dumps(body)
        length = len(data)
        values = (
            str(length - 5),
            str(length + 50),
            "-1",
            "abc",
            "",
            "9" * 30,
            f"{length}, {length}",
            "0x10",
            f"+{length}",
        )
        wrong = values[int(random.integers(len(values)))]
        lines = [(b"Content-Length", wrong.encode())]
        if random.integers(3) == 0:
            lines.append(_pick(random, ((b"Content-Length", b"3"), (b"Transfer-Encoding", b"chunked"))))
        request = _http(b"POST", path, [*self._headers_of(b"application/json"), *lines], data)
        return FuzzCase("content length", request, "none" if wrong == str(length + 50) else "any")

    def _chunked(self, random: np.random.Generator) -> FuzzCase:
        path, body = _body(random)
        data = _dumps(body)
        cut = int(random.integers(1, max(len(data), 2)))
        parts = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (data[:cut], data[cut:]) if part)
        headers = [*self._headers_of(b"application/json"), (b"Transfer-Encoding", b"chunked")]
        way = random.integers(4)
        if way == 0:
            return FuzzCase("chunked", _http(b"POST", path, headers, parts + b"0\r\n\r\n"))
        if way == 1:
            return FuzzCase("truncated chunks", _http(b"POST", path, headers, parts), "none")
        if way == 2:
            short = b"%x\r\n%s" % (len(data) + 10, data)
            return FuzzCase("truncated chunks", _http(b"POST", path, headers, short), "none")
        sizes = (
            b"zz\r\n",
            b"-5\r\n",
            b"fffffffffffffffff\r\n",
            b"5;" + b"x" * 5000 + b"\r\nabcde\r\n0\r\n\r\n",
            b"\r\n",
        )
        return FuzzCase("bad chunks", _http(b"POST", path, headers, _pick(random, sizes)), "any")

    def _batches(self, random: np.random.Generator) -> FuzzCase:
        path, body = _body(random)
        size = int(_pick(random, (0, 0, 0, 1, 600, _MANY_TEXTS)))
        return FuzzCase("empty and large batches", self._post(path, _dumps(_resize(body, size))))

    def _huge_batches(self, random: np.random.Generator) -> FuzzCase:
        path, body = _body(random)
        if random.integers(2):
            return FuzzCase("enormous batches", self._post(path, _dumps(_resize(body, _HUGE_TEXTS))))
        long = json.loads(_dumps(body).replace(SECRET.encode(), (SECRET + " long").encode() * 50_000))
        return FuzzCase("enormous texts", self._post(path, _dumps(long)))

    def _endless(self, random: np.random.Generator) -> FuzzCase:
        """More than any limit, in chunks of which none is the last."""
        path = _pick(random, ("/health", *PATHS))
        method = b"GET" if path == "/health" else b"POST"
        headers = [*self._headers_of(b"application/json"), (b"Transfer-Encoding", b"chunked")]
        part = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        return FuzzCase("endless body", _http(method, path, headers, part * 400), "any")

    def _slow(self, random: np.random.Generator) -> FuzzCase:
        """A body of which the rest does not come."""
        path, body = _body(random)
        data = _dumps(body)
        headers = [*self._headers_of(b"application/json"), (b"Content-Length", b"%d" % (len(data) + 1000))]
        return FuzzCase("slow body", _http(b"POST", path, headers, data), statuses=(429, 503, 504))

    def _no_text(self, random: np.random.Generator) -> FuzzCase:
        """Headers whose bytes are no text, for some of which the server has a meaning."""
        path, body = _body(random)
        names = [b"X-Request-Id", b"traceparent", b"Accept", b"serve_multiplexed_model_id", b"X-Session-Id"]
        names += [b"X-Request-Timeout-Seconds", b"X-Request-Disconnect-Disabled"]
        value = _pick(random, (b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"0.001", b"-1", b"?1", b"nan", b"\xe2\x82"))
        return FuzzCase("headers that are no text", self._post(path, _dumps(body), [(_pick(random, names), value)]))

    def _paths(self, random: np.random.Generator) -> FuzzCase:
        path, body = _body(random)
        letters = "".join(_pick(random, string.ascii_letters + string.digits + "/._-%~") for _ in range(12))
        odd_paths = [f"/{letters}", f"{path}/", f"//{path}", f"{path}/../..{path}", f"{path}?a={letters}", f"{path}%00"]
        odd_paths += [f"{path}?{'a=1&' * 500}", "/" + "a" * 6000, f"/%ff%fe{letters}", "/docs", "/-/x", f"{path}#x"]
        target = _pick(random, (path, path, *odd_paths, *GET_PATHS))
        method = _pick(random, (b"GET", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"HEAD", b"POST", b"POST", b"QUERY"))
        standard = method != b"QUERY" and "#" not in target and not target.startswith("//")
        headers = [*self._headers_of(b"application/json"), (b"Content-Length", b"%d" % len(_dumps(body)))]
        request = _http(method, target, headers, _dumps(body))
        return FuzzCase("methods and paths", request, "typed" if standard else "any", has_body=method != b"HEAD")

    def _headers(self, random: np.random.Generator) -> FuzzCase:
        path, body = _body(random)
        extra = [_pick(random, _HEADERS)]
        if random.integers(8) == 0:
            extra = [(b"X-%d" % number, b"1") for number in range(300)]
        return FuzzCase("headers", self._post(path, _dumps(body), extra), "any")

    def _strangers(self, random: np.random.Generator) -> FuzzCase:
        """Nobody's token: nothing but a 401 may come back, whatever is asked."""
        path, body = _body(random)
        token = self._token.encode()
        credentials = _pick(random, (*_CREDENTIALS, b"Bearer " + token[:-1], b"Token " + token, b"Bearer x" + token))
        headers = [(b"Content-Type", b"application/json")]
        headers += [] if credentials is None else [(b"Authorization", credentials)]
        if random.integers(2):
            request = _http(b"GET", _pick(random, (*GET_PATHS, *PATHS, "/nothing")), headers, b"")
        else:
            data = _dumps(body)
            request = _http(b"POST", path, [*headers, (b"Content-Length", b"%d" % len(data))], data)
        return FuzzCase("without the token", request, statuses=(401,))

    def _headers_of(self, media_type: bytes) -> list[tuple[bytes, bytes]]:
        return [(b"Content-Type", media_type), (b"Authorization", b"Bearer " + self._token.encode())]

    def _post(
        self,
        path: str,
        data: bytes,
        extra: Sequence[tuple[bytes, bytes]] = (),
        media_type: bytes = b"application/json",
    ) -> bytes:
        headers = [*self._headers_of(media_type), (b"Content-Length", b"%d" % len(data)), *extra]
        return _http(b"POST", path, headers, data)


def _http(method: bytes, path: str, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> bytes:
    hosts = [] if any(name == b"Host" for name, _ in headers) else [(b"Host", b"127.0.0.1")]
    lines = [b"%s: %s" % header for header in (*hosts, *headers)]
    return b"\r\n".join([b"%s %s HTTP/1.1" % (method, path.encode()), *lines, b"", body])


def _turns(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": text}]


def _body(random: np.random.Generator) -> tuple[str, Any]:
    path, make = BODIES[int(random.integers(len(BODIES)))]
    return path, make(f"{SECRET} {int(random.integers(1000))}")


def _dumps(body: Any) -> bytes:
    return json.dumps(body).encode()


def _pick(random: np.random.Generator, choices: Sequence[Any]) -> Any:
    return choices[int(random.integers(len(choices)))]


def _places(body: Any) -> Iterator[tuple[Any, Any]]:
    """Every value of a body, as its container and its key there."""
    if isinstance(body, dict | list):
        for key, value in list(body.items() if isinstance(body, dict) else enumerate(body)):
            yield body, key
            yield from _places(value)


def _replace_one(body: Any, value: Any, random: np.random.Generator) -> Any:
    places = list(_places(body))
    if not places:
        return value
    container, key = places[int(random.integers(len(places)))]
    container[key] = value
    return body


def _mutate(body: Any, random: np.random.Generator) -> Any:
    """A body with one value replaced, removed, wrapped, or added."""
    places = list(_places(body))
    if not places or random.integers(20) == 0:
        return _pick(random, (None, True, 1, "x", [], {}, [body], {"query": body}))
    container, key = places[int(random.integers(len(places)))]
    way = random.integers(4)
    if way == 0:
        container[key] = deepcopy(_pick(random, _VALUES))
    elif way == 1:
        del container[key]
    elif way == 2:
        container[key] = _pick(random, ([container[key]], {"content": container[key]}, [container[key]] * 3))
    elif isinstance(container, dict):
        container[_pick(random, _NAMES)] = deepcopy(_pick(random, _VALUES))
    else:
        container.insert(key, deepcopy(_pick(random, _VALUES)))
    return body


def _resize(body: Any, size: int) -> Any:
    """A body whose lists have so many entries."""
    if isinstance(body, dict):
        return {key: _resize(value, size) for key, value in body.items()}
    if isinstance(body, list) and body:
        return [body[0]] * size
    return body
