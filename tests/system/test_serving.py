"""The reward service as it is deployed: Ray Serve behind HAProxy, asked over HTTP by the clients' own calls."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import openai
import psutil
import pytest
import requests
import yaml
from pydantic import SecretStr
from transformers import AutoTokenizer

from rlhf_ray.config.load import load_config
from rlhf_ray.config.reward import RewardSettings
from rlhf_ray.config.serving import ServingConfig
from rlhf_ray.data.presets import prepare
from rlhf_ray.reward.client import RewardClient, Text
from rlhf_ray.reward.core.protocol import Conversation
from rlhf_ray.reward.core.remote_scorer import RemoteScorer
from rlhf_ray.reward.core.scorer import RewardScorer
from rlhf_ray.reward.serve.audit import verified_records
from rlhf_ray.reward.serve.deploy import write_serve_config
from rlhf_ray.reward.serve.front import OPEN_PATHS
from tests.making import rollout_of
from tests.planting import copied, edit_weights
from tests.system.chromium import Browser
from tests.system.commands import Command, run, start, wait_until

TOKEN, OTHER_TOKEN = "a-token-of-24-characters", "another-of-24-characters"
TEXTS = [
    f"The {kind} film was {what} in part {number}."
    for number in range(4)
    for kind in ("old", "new")
    for what in ("good", "bad")
]
TURNS = [{"role": "user", "content": "What about it?"}, {"role": "assistant", "content": "good"}]
START_S, CHANGE_S = 120, 60


@dataclass
class Running:
    """A service, and the models that it may be given."""

    url: str
    port: int
    config: Path
    models: dict[str, Path]
    command: Command
    folder: Path

    @property
    def with_token(self) -> str:
        return f"http://x:{TOKEN}@127.0.0.1:{self.port}"

    def get(self, path: str) -> Any:
        return httpx.get(f"{self.with_token}{path}", timeout=30).raise_for_status().json()

    def expected(self, model: str, texts: Sequence[str]) -> dict[str, float]:
        """Scores of the offline scorer."""
        path = str(self.models[model])
        scorer = RewardScorer(RewardSettings(model=path, on_too_long="truncate"))
        return dict(zip(texts, scorer.score_texts(texts).scores.tolist(), strict=True))

    def again(self, *overrides: str, status: int = 0, name: str = "again") -> Command:
        """The same command once more, with other settings."""
        arguments = ["serve-rm", str(self.config), *overrides]
        command = run(arguments, self.folder / f"{name}.out", CHANGE_S)
        assert command.process.returncode == status, command.stderr
        return command


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("service")
    prepare("tiny", folder, lambda line: None)
    models = {"first": folder / "tiny" / "reward_model"}
    for name, factor in (("second", 2.0), ("reversed", -1.0)):
        models[name] = copied(models["first"], folder / name)
        edit_weights(models[name], lambda weights, by=factor: {**weights, "score.weight": weights["score.weight"] * by})
    port = free_port()
    config = folder / "serve.yaml"
    settings = {
        "run": {"name": "tiny-service"},
        "paths": {"runs": str(folder / "runs")},
        "models": {"main": {"path": str(models["first"])}},
        "endpoint": {"port": port, "token_file": str(folder / "tokens.yaml")},
        "limits": {"max_queued_requests": 48, "max_texts": 64, "max_body_bytes": 200000},
        "candidates": {"min_texts": 100},
        "audit": {"enabled": True, "texts": "full"},
        "cluster": {"object_store_gib": 0.2, "num_cpus": 2},
    }
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    callers = {"tests": {"tokens": [TOKEN]}, "other": {"tokens": [OTHER_TOKEN], "max_texts": 64}}
    (folder / "tokens.yaml").write_text(yaml.safe_dump(callers, sort_keys=False), encoding="utf-8")
    command = start(["serve-rm", str(config)], folder / "service.out")
    running = Running(f"http://127.0.0.1:{port}", port, config, models, command, folder)

    def is_up() -> bool:
        assert command.process.poll() is None, command.stderr
        return "scores at" in command.stdout

    wait_until(is_up, START_S, "the service")
    processes = psutil.Process(command.process.pid).children(recursive=True)
    yield running
    if command.process.poll() is None:
        processes += psutil.Process(command.process.pid).children(recursive=True)
        running.again("--stop", name="stop")
    assert command.wait(60) == 0, command.stderr
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive, [process.name() for process in alive]
    assert not (folder / "runs" / "tiny-service" / "service.json").exists()


def test_every_family_and_the_offline_scorer_agree_to_the_bit(service: Running):
    expected = service.expected("first", TEXTS)
    text = TEXTS[0]
    bodies = {
        "/get_reward": {"query": TEXTS, "prompts": ["p"] * len(TEXTS), "labels": [None] * len(TEXTS)},
        "/classify": {"model": "any", "input": TEXTS, "use_activation": False},
        "/pooling": {"input": TEXTS, "use_activation": False},
        "/v1/embeddings": {"input": TEXTS},
        "/predict": {"inputs": [[each] for each in TEXTS], "raw_scores": True},
    }
    for path, body in bodies.items():
        # `requests`, with the token in the URL, as OpenRLHF sends it.
        content = requests.post(f"{service.with_token}{path}", json=body, timeout=30).json()
        found = (
            content["rewards"]
            if path == "/get_reward"
            else [row[0]["score"] for row in content]
            if path == "/predict"
            else [(row.get("probs") or row.get("data") or row["embedding"])[-1] for row in content["data"]]
        )
        assert dict(zip(TEXTS, found, strict=True)) == expected, path
    sglang = requests.post(f"{service.with_token}/classify", json={"text": TEXTS}, timeout=30).json()
    assert [row["embedding"][0] for row in sglang] == list(expected.values())
    slime = requests.post(f"{service.with_token}/slime", json={"prompt": text[:4], "response": text[4:]}, timeout=30)
    assert slime.json()["score"] == expected[text]
    with RewardClient(service.url, TOKEN) as client:
        rewards = client.reward([Text(each) for each in TEXTS])
    assert [reward.score for reward in rewards.items] == list(expected.values())


def test_a_run_scores_with_it_as_with_a_model_of_its_own(service: Running):
    policy = str(service.models["first"].parent / "policy")
    tokenizer = AutoTokenizer.from_pretrained(policy)
    prompts = {index: Conversation(text[:8]) for index, text in enumerate(TEXTS[:3])}
    rollout = rollout_of(
        [tokenizer(prompt.text).input_ids for prompt in prompts.values()],
        [[*tokenizer(text[8:]).input_ids, tokenizer.eos_token_id] for text in TEXTS[:3]],
        finished=True,
    )
    settings = RewardSettings(url=service.url, batch_size=2)
    scored = RemoteScorer(settings, policy, SecretStr(TOKEN)).score(rollout, prompts)
    assert not any(scored.failures)
    assert scored.scores.tolist() == list(service.expected("first", TEXTS[:3]).values())


def test_the_openai_package_and_our_own_route_agree_on_a_conversation(service: Running):
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key=TOKEN)
    choice = client.chat.completions.create(model="main", messages=TURNS).choices[0]  # type: ignore[arg-type]
    own = requests.post(f"{service.with_token}/v1/reward", json={"items": [{"messages": TURNS}]}, timeout=30).json()
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert choice.logprobs.content[0].logprob == own["items"][0]["score"]
    assert choice.message.content == f"reward:{own['items'][0]['score']!r}"


def test_nobody_gets_in_without_the_token_and_the_id_is_echoed(service: Running):
    paths = service.get("/openapi.json")["paths"]
    with httpx.Client(base_url=service.url) as client:
        for path, operations in paths.items():
            for method in operations:
                wanted = 200 if path in OPEN_PATHS else 401
                assert client.request(method, path, json={}).status_code == wanted, path
        answer = client.get("/v1/models", headers={"X-Request-Id": "mine", "Authorization": f"Bearer {TOKEN}"})
    assert answer.headers.get_list("X-Request-Id") == ["mine"]
    proxies = [p for p in psutil.process_iter() if "haproxy" in p.name() and _below(p, service)]
    listening = [c for p in proxies for c in p.net_connections("inet") if c.status == "LISTEN"]
    # Its pages of statistics too.
    assert {c.laddr.ip for c in listening} == {"127.0.0.1"}
    assert service.port in {c.laddr.port for c in listening}
    sockets = {str(c.laddr) for p in proxies for c in p.net_connections("unix") if "admin.sock" in str(c.laddr)}
    # It was bound under another name, and got its own when it was ready.
    assert {stat.S_IMODE(Path(path).with_name("admin.sock").stat().st_mode) for path in sockets} == {0o600}


def test_serve_itself_reads_nothing_that_was_not_asked_for(service: Running):
    with httpx.Client(base_url=service.url) as client:
        answer = client.post("/get_reward", json={"query": TEXTS[:1]}, headers={"X-Request-Id": b"\xff"})  # type: ignore[dict-item]
        assert (answer.status_code, answer.json()["error"]["type"]) == (401, "unauthorized")
    replica = max(
        (p for p in psutil.process_iter() if "ServeReplica" in " ".join(p.cmdline()) and "replica" in p.cmdline()[0]),
        key=lambda process: process.memory_info().rss,
    )
    before = replica.memory_info().rss
    with socket.create_connection(("127.0.0.1", service.port), timeout=5) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        part, sent = b"10000\r\n" + b"x" * 0x10000 + b"\r\n", 0
        with suppress(OSError):
            while sent < 400 << 20:
                sent += connection.send(part)
    assert replica.memory_info().rss - before < 64 << 20
    assert sent < 64 << 20


class Load:
    """Clients that send one text a request, in a loop, and look at every answer."""

    def __init__(self, service: Running, clients: int = 8) -> None:
        self._service, self._clients = service, clients
        self.statuses: Counter[int | str] = Counter()
        self.scores: set[tuple[str, str, float]] = set()
        self._ending = asyncio.Event()

    async def during(self, work: Any) -> None:
        """Load the service while something else happens in a thread."""
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(60)) as session:
            clients = [asyncio.create_task(self._ask(session, number)) for number in range(self._clients)]
            try:
                await asyncio.to_thread(work)
            finally:
                self._ending.set()
                await asyncio.gather(*clients)

    async def _ask(self, session: aiohttp.ClientSession, number: int) -> None:
        while not self._ending.is_set():
            text = TEXTS[number % len(TEXTS)]
            number += 1
            # `aiohttp` takes the token from the URL too.
            try:
                async with session.post(f"{self._service.with_token}/get_reward", json={"query": [text]}) as answer:
                    self.statuses[answer.status] += 1
                    if answer.status == 200:
                        version, reward = answer.headers["X-Model-Version"], (await answer.json())["rewards"][0]
                        self.scores.add((version, text, reward))
            except aiohttp.ClientError as error:
                self.statuses[repr(error)] += 1


def test_models_are_exchanged_under_load_without_a_failed_or_mixed_answer(service: Running):
    load = Load(service)

    def exchange() -> None:
        service.again(f"models.main.path={service.models['second']}")
        service.again()

    asyncio.run(load.during(exchange))
    assert set(load.statuses) == {200}, load.statuses
    one, two = service.expected("first", TEXTS), service.expected("second", TEXTS)
    by_version: dict[str, dict[str, float]] = {}
    for version, text, score in load.scores:
        assert by_version.setdefault(version, {}).setdefault(text, score) == score
    assert len(by_version) == 2
    assert all(found in ({t: one[t] for t in found}, {t: two[t] for t in found}) for found in by_version.values())


def test_new_weights_in_the_same_directory_are_loaded_by_the_same_command(service: Running):
    models = {name: copied(service.models["first"], service.folder / f"in-place-{name}") for name in ("old", "new")}
    edit_weights(models["new"], lambda weights: {**weights, "score.weight": weights["score.weight"] * 3.0})
    service.models |= models
    override = f"models.main.path={models['old']}"
    expected = {name: service.expected(name, TEXTS) for name in models}
    service.again(override)

    def asked() -> tuple[str, dict[str, float]]:
        answer = httpx.post(f"{service.with_token}/get_reward", json={"query": TEXTS}, timeout=30)
        return answer.headers["X-Model-Version"], dict(zip(TEXTS, answer.json()["rewards"], strict=True))

    before, scores = asked()
    assert scores == expected["old"]
    shutil.copyfile(models["new"] / "model.safetensors", models["old"] / "model.safetensors")
    assert asked() == (before, expected["old"])
    service.again(override)
    after, scores = asked()
    assert after != before
    assert scores == expected["new"]
    service.again()


def test_a_model_that_cannot_be_served_changes_nothing(service: Running):
    broken = copied(service.models["first"], service.folder / "broken")
    (broken / "model.safetensors").write_bytes(b"nonsense")
    before = service.get("/v1/models")["data"][0]["version"]
    refused = service.again(f"models.main.path={broken}", status=2, name="refused")
    assert "models.main.path" in refused.stderr
    assert service.get("/v1/models")["data"][0]["version"] == before


def test_the_scoring_process_may_die(service: Running):
    load = Load(service)
    host = next(p for p in psutil.process_iter() if "ScorerHost" in " ".join(p.cmdline()) and _below(p, service))

    def kill() -> None:
        host.kill()
        wait_until(lambda: "rlhf_ray_scorer_restarts" in _metrics(service) and _restarts(service) > 0, 60, "a new one")

    asyncio.run(load.during(kill))
    assert set(load.statuses) == {200}, load.statuses


def _below(process: psutil.Process, service: Running) -> bool:
    return service.command.process.pid in {parent.pid for parent in process.parents()}


def _metrics(service: Running) -> str:
    return httpx.get(f"{service.with_token}/metrics", timeout=30).text


def _restarts(service: Running) -> float:
    lines = [line for line in _metrics(service).splitlines() if line.startswith("rlhf_ray_scorer_restarts{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_overload_is_said_and_ends(service: Running):
    async def flood() -> list[tuple[int, Any, str | None]]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def ask(path: str, body: Any) -> tuple[int, Any, str | None]:
                async with session.post(f"{service.with_token}{path}", json=body) as answer:
                    return answer.status, await answer.json(), answer.headers.get("Retry-After")

            long = [TEXTS[0] * 3] * 64
            asked = [ask("/get_reward", {"query": long}) for _ in range(80)]
            asked += [ask("/predict", {"inputs": [[text] for text in long]}) for _ in range(20)]
            return await asyncio.gather(*asked)

    answers = asyncio.run(flood())
    counts = Counter(status for status, _, _ in answers)
    assert set(counts) == {200, 429, 503}, counts
    assert all(wait == "1" for status, _, wait in answers if status != 200)
    assert {body["error"]["type"] for status, body, _ in answers if status == 503} == {"overloaded"}
    assert httpx.post(f"{service.with_token}/get_reward", json={"query": TEXTS[:1]}, timeout=30).status_code == 200


def test_a_shadow_that_orders_responses_otherwise_is_taken_back(service: Running):
    service.again(
        f"models.canary={{path: {service.models['second']}, share: 0.3}}",
        f"models.next={{path: {service.models['reversed']}, shadow: true}}",
    )
    roles = {model["id"]: model["role"] for model in service.get("/v1/models")["data"]}
    assert roles == {"main": "live", "canary": "live", "next": "shadow"}
    texts = [f"{text} {number}" for number in range(12) for text in TEXTS]
    versions: Counter[str] = Counter()
    for text in texts:
        answer = httpx.post(f"{service.with_token}/get_reward", json={"query": [text], "prompts": [text]}, timeout=30)
        versions[answer.headers["X-Model-Name"]] += 1
    assert versions["next"] == 0
    assert versions["canary"] == pytest.approx(0.3 * len(texts), abs=4 * (0.21 * len(texts)) ** 0.5)

    def taken_back() -> Any:
        rows = service.get("/v1/service")["models"]
        return next((row for row in rows if row["name"] == "next" and row["role"] == "rolled_back"), None)

    row = wait_until(taken_back, 30, "the shadow rolled back")
    assert "sign" in row["reason"]
    wait_until(lambda: len(service.get("/v1/models")["data"]) == 2, 30, "the order followed")
    report = service.again("--report", name="report")
    assert "rolled back" in report.stdout
    assert "rolled back" in report.stdout
    service.again()


def test_the_page_compares_two_responses(service: Running):
    with Browser() as browser:
        browser.navigate(service.with_token + "/")
        browser.fill("#prompt", "The film")
        browser.fill("#response-a", "was good")
        browser.fill("#response-b", "was bad")
        browser.press("Enter", control=True)
        browser.wait_for("document.querySelectorAll('#words-b .word').length > 0", 30)
        shown = browser.evaluate("document.querySelector('#verdict').textContent")
        browser.wait_for("document.querySelectorAll('#models-table tr').length > 0", 30)
        browser.screenshot(service.folder / "page.png")
        assert "%" in shown
        assert not browser.problems


def test_the_audit_log_names_callers_and_is_replayed_to_the_bit(service: Running):
    texts = [f"{text} Once more." for text in TEXTS]
    for token, share in ((TOKEN, texts[:-3]), (OTHER_TOKEN, texts[-3:])):
        headers = {"Authorization": f"Bearer {token}", "X-Request-Id": f"once-more-{len(share)}"}
        answer = httpx.post(f"{service.url}/get_reward", json={"query": share}, headers=headers, timeout=30)
        answer.raise_for_status()
    counted = re.findall(r'rlhf_ray_caller_texts_total\{caller="(\w+)",replica="[^"]*"\} ([0-9.]+)', _metrics(service))
    assert {name: float(count) >= 3 for name, count in counted} == {"tests": True, "other": True}
    folder, heads = service.folder / "runs" / "tiny-service" / "audit", service.folder / "heads.json"

    def logged() -> bool:
        return sum(path.read_bytes().count(b'"once-more-') for path in folder.glob("*.jsonl")) == len(texts)

    wait_until(logged, 10, "the records")

    def noted() -> bool:
        heads.write_text(json.dumps(service.get("/v1/service")))
        return sum(head["records"] for head in json.loads(heads.read_text())["audit"]) >= len(texts)

    wait_until(noted, 10, "the log's heads")
    copy = shutil.copytree(folder, service.folder / "audit-copy")
    callers = Counter(
        (record.request_id, record.caller)
        for _, record in verified_records(copy)
        if record.request_id.startswith("once-more-")
    )
    assert callers == {(f"once-more-{len(texts) - 3}", "tests"): len(texts) - 3, ("once-more-3", "other"): 3}
    models = [f"models.{name}={{path: {path}, shadow: true}}" for name, path in service.models.items()]
    replayed = service.again(*models, "--replay", str(copy), "--heads", str(heads), name="replay")
    number, _, rest = replayed.stdout.strip().partition(" ")
    assert rest == "scores are bit-for-bit the same"
    assert int(number) >= len(texts)


def test_the_serve_config_is_one_that_serve_takes(service: Running, tmp_path: Path):
    from ray.serve.schema import ServeDeploySchema

    config = load_config(ServingConfig, service.config)
    write_serve_config(config, tmp_path / "serve.yaml")
    document = yaml.safe_load((tmp_path / "serve.yaml").read_text(encoding="utf-8"))
    schema = ServeDeploySchema.model_validate(document)
    assert schema.applications[0].import_path == "rlhf_ray.reward.serve.application:build"
    assert TOKEN not in json.dumps(document)


def test_a_port_in_use_and_an_open_address_are_refused_before_anything_starts(service: Running, tmp_path: Path):
    for overrides, cause in (
        (["run.name=other"], "endpoint.port"),
        (["run.name=other", "endpoint.host=0.0.0.0", "endpoint.token_file=null"], "endpoint.host"),
    ):
        environment = {name: value for name, value in os.environ.items() if name != "RLHF_RAY_TOKEN"}
        command = [os.sys.executable, "-m", "rlhf_ray", "serve-rm", str(service.config), *overrides]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        assert (ended.returncode, cause in ended.stderr) == (2, True), ended.stderr


def test_a_signal_ends_it_with_everything_it_started(service: Running):
    service.command.process.send_signal(signal.SIGTERM)
    assert service.command.wait(60) == 0
