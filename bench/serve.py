"""The reward service against the offline scorer and a plain server: `python -m bench.serve`

For MiniLM and SmolLM2-135M, in bfloat16 and float32, one compute thread each, on the same texts: what `RewardScorer`
scores in batches as large as the service's largest, what 64 clients get from the service with one sample a request, and
what they get from `bench.plain_server`, which runs one forward pass for each request. The three run in alternation, and
the median of the rounds counts; ratios are of neighbours in time, so that a machine that slows down slows both.

It then checks that every family of routes gives the offline scorer's score: up to rounding in float32, and bit for bit
in the batch-invariant mode. Heads are new: neither time nor scores being equal depends on what a model has learnt.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import numpy as np
import torch
from numpy.typing import NDArray

from bench.load import Load, read_texts, start_load
from bench.results import Report, Result
from bench.service import (
    RunningServer,
    free_port,
    new_reward_model,
    quiet_transformers,
    running_server,
    serve_command,
    write_config,
)
from rlhf_ray.config.reward import RewardSettings
from rlhf_ray.config.serving import BatchingSettings
from rlhf_ray.reward.core.scorer import RewardScorer

CLIENTS = 64
WARM_UP_S = 4.0
QUESTION = "What did you think of the film?"
NAME = "reward"


@dataclass(frozen=True)
class Case:
    """A model in one compute type.

    Attributes:
        name: in the results.
        model: directory.
        dtype: compute type.
        plain_target: of served over plain, where one is set.
        equal_texts: texts that every family of routes is asked for in float32.
    """

    name: str
    model: Path
    dtype: str
    plain_target: str | None
    equal_texts: int


@dataclass(frozen=True)
class Family:
    """A route as its clients call it, asking for the raw score of one text.

    Attributes:
        body: of a request.
        score: in the answer.
        is_chat: the text is the assistant's turn after `QUESTION`.
    """

    path: str
    body: Callable[[str], Mapping[str, Any]]
    score: Callable[[Any], float]
    is_chat: bool = False


FAMILIES = {
    "OpenRLHF": Family(
        "/get_reward",
        lambda text: {"query": [text], "prompts": [""], "labels": [None]},
        lambda answer: answer["rewards"][0],
    ),
    "slime": Family(
        "/slime", lambda text: {"prompt": "", "response": text, "label": None}, lambda answer: answer["score"]
    ),
    "verl, classify": Family(
        "/classify",
        lambda text: {"model": NAME, "input": text, "use_activation": False},
        lambda answer: answer["data"][-1]["probs"][-1],
    ),
    "verl, embeddings": Family(
        "/v1/embeddings",
        lambda text: {"model": NAME, "input": text},
        lambda answer: answer["data"][-1]["embedding"][-1],
    ),
    "SGLang": Family(
        "/classify", lambda text: {"model": NAME, "text": [text]}, lambda answer: answer[0]["embedding"][0]
    ),
    "vLLM, pooling": Family(
        "/pooling",
        lambda text: {"model": NAME, "input": [text], "use_activation": False},
        lambda answer: answer["data"][0]["data"][0],
    ),
    "Text Embeddings Inference": Family(
        "/predict", lambda text: {"inputs": text, "raw_scores": True}, lambda answer: answer[0]["score"]
    ),
    "OpenAI chat": Family(
        "/v1/chat/completions",
        lambda text: {"model": NAME, "messages": list(_conversation(text))},
        lambda answer: float(answer["choices"][0]["message"]["content"].partition(":")[2]),
        is_chat=True,
    ),
    "our own": Family(
        "/v1/reward",
        lambda text: {"model": NAME, "items": [{"text": text}]},
        lambda answer: answer["items"][0]["score"],
    ),
}


@dataclass(frozen=True)
class Offline:
    """Speed of the scorer without a service.

    Attributes:
        texts_per_s: in full batches.
        batch_s: one full batch, the median.
    """

    texts_per_s: float
    batch_s: float


def offline_speed(scorer: RewardScorer, texts: Sequence[str], batch: int, seconds: float) -> Offline:
    """Score full batches for that long."""
    times: list[float] = []
    while sum(times) < seconds:
        first = len(times) * batch % (len(texts) - batch + 1)
        started = time.perf_counter()
        scorer.score_texts(texts[first : first + batch])
        times.append(time.perf_counter() - started)
    return Offline(batch * len(times) / sum(times), statistics.median(times))


def speed_results(case: Case, texts: Path, folder: Path, rounds: int, seconds: float) -> list[Result]:
    """Offline, served and plain, in alternation; and how long the service takes to its first score."""
    corpus = read_texts(texts)
    batch = BatchingSettings().max_texts
    scorer = RewardScorer(RewardSettings(model=str(case.model), dtype=case.dtype, batch_size=batch))
    offline_speed(scorer, corpus, batch, WARM_UP_S)
    plain_port = free_port()
    plain_command = [sys.executable, "-m", "bench.plain_server", "--model", str(case.model)]
    plain_command += ["--dtype", case.dtype, "--port", str(plain_port)]
    threads = {"OMP_NUM_THREADS": "1"}
    offline, served, plain = [], [], []
    with (
        _service(case.model, folder, dtype=case.dtype) as service,
        running_server(plain_command, plain_port, threads) as plain_server,
    ):

        def load(server: RunningServer, length_s: float) -> Load:
            out = folder / "load.jsonl"
            return _all_answered(start_load(server.url, texts, out, seconds=length_s, clients=CLIENTS).result())

        for server in (service, plain_server):
            load(server, WARM_UP_S)
        for number in range(1, rounds + 1):
            offline.append(offline_speed(scorer, corpus, batch, seconds))
            served.append(load(service, seconds).summary)
            plain.append(load(plain_server, seconds).summary)
            print(
                f"{case.name}, round {number}: offline {offline[-1].texts_per_s:.1f}, served "
                f"{served[-1].throughput:.1f}, plain {plain[-1].throughput:.1f} texts/s",
                flush=True,
            )
        cold_start_s = service.first_score_s
    over_offline = [one.throughput / other.texts_per_s for one, other in zip(served, offline, strict=True)]
    over_plain = [one.throughput / other.throughput for one, other in zip(served, plain, strict=True)]
    p99_over_batch = [one.p99_s / other.batch_s for one, other in zip(served, offline, strict=True)]
    client_share = max(one.cpu_s_per_request * one.tries / one.seconds for one in served)
    return [
        Result(f"{case.name}: offline scorer", statistics.median(each.texts_per_s for each in offline), "texts/s"),
        Result(f"{case.name}: served, {CLIENTS} clients", _median_throughput(served), "texts/s"),
        Result(f"{case.name}: plain server", _median_throughput(plain), "texts/s"),
        Result(f"{case.name}: served over offline", statistics.median(over_offline), "×", ">= 0.8"),
        Result(f"{case.name}: served over plain", statistics.median(over_plain), "×", case.plain_target),
        Result(f"{case.name}: one full batch offline", statistics.median(each.batch_s for each in offline), "s"),
        Result(f"{case.name}: served, median latency", statistics.median(each.p50_s for each in served), "s"),
        Result(f"{case.name}: served, p99 latency", statistics.median(each.p99_s for each in served), "s"),
        Result(f"{case.name}: p99 over one full batch", statistics.median(p99_over_batch), "×", "<= 4"),
        Result(f"{case.name}: a core's share that the clients took", client_share),
        Result(f"{case.name}: command to first score", cold_start_s, "s", "<= 40 s"),
    ]


def equality_results(case: Case, texts: Path, folder: Path, *, invariant: bool) -> list[Result]:
    """Every family of routes against the offline scorer in float32, requests of all mixed in the batches."""
    corpus = read_texts(texts)[: case.equal_texts]
    scorer = RewardScorer(RewardSettings(model=str(case.model), dtype="float32", batch_invariant=invariant))
    expected = {
        False: scorer.score_texts(corpus).scores,
        True: scorer.score_encoded([scorer.texts.encode_messages(_conversation(text)) for text in corpus]).scores,
    }
    with _service(case.model, folder, dtype="float32", batch_invariant=invariant) as service:
        found = asyncio.run(family_scores(service.url, corpus))
    results = []
    if not invariant:
        # Kernels round by shape, service or not: what the neighbours in a batch do to a score, without any service.
        alone = np.array([scorer.score_texts([text]).scores[0] for text in corpus])
        floor = float(np.abs(alone - expected[False]).max())
        results.append(Result(f"{case.name}: largest difference offline, alone and in batches", floor))
        results.append(Result(f"{case.name}: standard deviation of the scores", float(alone.std())))
    for name, family in FAMILIES.items():
        difference = np.abs(found[name] - expected[family.is_chat])
        if invariant:
            title = f"{case.name}: scores that differ by a bit, batch-invariant, {name}"
            results.append(Result(title, int((difference != 0).sum()), target="<= 0"))
        else:
            title = f"{case.name}: largest difference to offline, {name}"
            results.append(Result(title, float(difference.max()), target="<= 1e-6"))
    return results


async def family_scores(url: str, texts: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """`[N]` scores of each family, all families at once."""
    at_once = asyncio.Semaphore(CLIENTS)

    async def ask(session: aiohttp.ClientSession, family: Family, text: str) -> float:
        async with at_once, session.post(url + family.path, json=family.body(text)) as response:
            answer = await response.text()
            if response.status != 200:
                raise RuntimeError(f"{family.path} answered {response.status}: {answer}")
            return float(family.score(json.loads(answer)))

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=180)) as session:
        # Neighbours in the queue are of different families.
        scores = await asyncio.gather(*(ask(session, family, text) for text in texts for family in FAMILIES.values()))
    table = np.array(scores).reshape(len(texts), len(FAMILIES))
    return {name: table[:, column] for column, name in enumerate(FAMILIES)}


def _service(model: Path, folder: Path, **scorer: object) -> Any:
    port = free_port()
    models = [{"name": NAME, "path": str(model.absolute())}]
    config = write_config(folder / "serve.yaml", models, port, scorer={"threads": 1, **scorer})
    return running_server(serve_command(config), port)


def _conversation(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": QUESTION}, {"role": "assistant", "content": text})


def _all_answered(load: Load) -> Load:
    if load.summary.failed:
        raise RuntimeError(f"not every request was answered: {load.summary.statuses}")
    return load


def _median_throughput(summaries: Sequence[Any]) -> float:
    return statistics.median(summary.throughput for summary in summaries)


def main() -> None:
    parser = argparse.ArgumentParser(description="The reward service against the offline scorer and a plain server.")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with hutto-movie and the models")
    parser.add_argument("--models", nargs="+", choices=("minilm", "smollm2-135m"), default=("minilm", "smollm2-135m"))
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quiet_transformers()
    texts = arguments.data / "hutto-movie" / "snippets_test.jsonl"
    report = Report("serve")
    with TemporaryDirectory() as name:
        folder = Path(name)
        for backbone in arguments.models:
            model = new_reward_model(arguments.data / backbone, folder / backbone)
            equal_texts = 500 if backbone == "minilm" else 50
            for dtype in arguments.dtypes:
                target = ">= 2.5" if (backbone, dtype) == ("minilm", "bfloat16") else None
                case = Case(f"{backbone} {dtype}", model, dtype, target, equal_texts)
                report.add(speed_results(case, texts, folder, arguments.rounds, arguments.seconds), case.name)
                if dtype == "float32":
                    for invariant in (False, True):
                        report.add(equality_results(case, texts, folder, invariant=invariant), f"{case.name}, equality")


if __name__ == "__main__":
    main()
