"""`make bench-gpu`: what the project does on GPUs, on a machine that has one of at least 40 GB.

Ray is told of more GPUs than there are, and every process sees the one: groups of several ranks, ZeRO over them, and
weights over NCCL then run with NCCL's sockets in place of its links between GPUs. What that leaves out is tensor
parallelism, and how fast any of it is.

- `kernel`: attention in packed rows, against float64, and its time;
- `scoring`: a reward model's scores, against the CPU's, and free of their batches;
- `runs`: `train-rm` and `ppo` with every kind of placement and transport, on the tiny model;
- `large`: PPO of a policy of 1.3 B parameters with random weights: seconds and memory of a step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from bench.results import Report, Result

DEADLINE_S = 400.0
AT_ONCE = 5
STEPS = 3
BFLOAT16_ROUNDING = 2.0**-8
PLACES = (
    "policy.learner.gpus=1",
    "critic.learner.gpus=1",
    "reference.gpus=0.5",
    "reward.gpus=0.5",
    "generator.gpus=1",
    "generator.gpu_memory_utilization=0.05",
    "generator.kv_cache_gib=0.5",
    f"steps={STEPS}",
)
BFLOAT16 = tuple(f"{role}.dtype=bfloat16" for role in ("policy.learner", "critic.learner", "reference", "generator"))
RUNS = {
    "PPO in float32": PLACES,
    "PPO in bfloat16": (*PLACES, *BFLOAT16),
    "PPO, CUDA graphs, one step ahead": (
        *PLACES, *BFLOAT16, "generator.enforce_eager=false", "algorithm.max_staleness=1",
    ),
    "PPO, weights over NCCL": (*PLACES, *BFLOAT16, "weights.transport=nccl"),
    "PPO, weights over NCCL, in flight": (
        *PLACES, *BFLOAT16, "weights.transport=nccl", "algorithm.max_staleness=1", "algorithm.in_flight_updates=true",
    ),
    "PPO, engine asleep while the policy learns": (*PLACES, *BFLOAT16, "generator.sleep=true"),
    "PPO, ZeRO-3 over two ranks, checkpointed activations": (
        *PLACES, *BFLOAT16,
        "policy.learner.replicas=2", "policy.learner.zero_stage=3", "policy.learner.gradient_checkpointing=true",
        "critic.learner.replicas=2", "critic.learner.zero_stage=2",
        "reference.replicas=2", "reference.sharded=true", "reference.gpus=1",
    ),
    "PPO, ZeRO-2 over two ranks, NCCL, two engines": (
        *PLACES, *BFLOAT16,
        "policy.learner.replicas=2", "policy.learner.zero_stage=2", "weights.transport=nccl", "generator.replicas=2",
    ),
    "PPO with adapters": (
        *(each for each in (*PLACES, *BFLOAT16) if "reference" not in each),
        "reference.dtype=auto", "policy.lora.rank=8",
    ),
}  # fmt: skip


@contextmanager
def many_gpus(count: int) -> Iterator[str]:
    """A cluster that believes in so many GPUs; gives its address."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 64, "num_gpus": count, "object_store_memory": 8 << 30, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster.address
    finally:
        cluster.shutdown()


class GpuMemory:
    """The most GPU and host memory of each role's processes, looked at every half second."""

    def __init__(self) -> None:
        self.device: dict[str, int] = defaultdict(int)
        self.host: dict[str, int] = defaultdict(int)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> GpuMemory:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        while not self._done.wait(0.5):
            lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
            for line in lines:
                pid, _, used = line.partition(",")
                try:
                    process = psutil.Process(int(pid))
                    name = process.cmdline()[0]
                    self.device[name] = max(self.device[name], int(used) << 20)
                    self.host[name] = max(self.host[name], process.memory_full_info().uss)
                except (psutil.Error, ValueError, IndexError):
                    continue


def kernel_results() -> list[Result]:
    from rlhf_ray.models import packing

    results = []
    draw = torch.Generator().manual_seed(0)
    lengths = [37, 5, 129, 64, 260, 17]
    row = packing.RowBounds(lengths).model_inputs(torch.device("cpu"))
    module = torch.nn.Module()
    for label, size, keys, more in (
        ("causal, grouped heads", 64, 2, {}),
        ("causal, head size 128", 128, 8, {}),
        ("causal, head size 32", 32, 8, {}),
        ("window of 48", 64, 8, {"sliding_window": 48}),
        ("bidirectional", 64, 8, {"is_causal": False}),
    ):
        shapes = [(1, heads, sum(lengths), size) for heads in (8, keys, keys)]
        exact = [torch.randn(shape, generator=draw, dtype=torch.float64).bfloat16().double() for shape in shapes]
        weights = torch.randn(1, sum(lengths), 8, size, generator=draw, dtype=torch.float64)
        outputs = []
        for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
            inputs = [each.to(device, dtype, copy=True).requires_grad_() for each in exact]
            arguments = {**row, **packing.RowBounds(lengths).model_inputs(torch.device(device)), **more}
            query, key, value = inputs
            attended, _ = packing.packed_sdpa(module, query, key, value, None, **arguments)
            (attended * weights.to(device, dtype)).sum().backward()
            grads = [each.grad for each in inputs if each.grad is not None]
            outputs.append([each.detach().double().cpu() for each in (attended, *grads)])
        for part, expected, found in zip(("output", "dq", "dk", "dv"), *outputs, strict=True):
            error = float((found - expected).norm() / expected.norm())
            results.append(Result(f"{label}: relative error of {part}", error, target=f"<= {2 * BFLOAT16_ROUNDING}"))
    return [*results, *_kernel_times()]


def _kernel_times() -> list[Result]:
    from rlhf_ray.models import packing

    lengths = np.random.default_rng(0).integers(64, 2048, 16).tolist()
    query, key, value = (
        torch.randn(1, heads, sum(lengths), 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (16, 4, 4)
    )
    row = packing.RowBounds(lengths).model_inputs(torch.device("cuda"))
    has_kernel = packing._has_varlen_kernel
    seconds = {}
    try:
        for name, choice in (("torch's kernel", has_kernel), ("padded", lambda *_: False)):
            packing._has_varlen_kernel = choice
            times = []
            for _ in range(12):
                torch.cuda.synchronize()
                started = time.perf_counter()
                attended, _ = packing.packed_sdpa(torch.nn.Module(), query, key, value, None, **row)
                attended.sum().backward()
                torch.cuda.synchronize()
                times.append(time.perf_counter() - started)
            seconds[name] = statistics.median(times[2:])
    finally:
        packing._has_varlen_kernel = has_kernel
    return [
        *(Result(f"{sum(lengths)} tokens, forward and backward, {name}", s * 1e3, "ms") for name, s in seconds.items()),
        Result("padded over torch's kernel", seconds["padded"] / seconds["torch's kernel"]),
    ]


def scoring_results(data: Path) -> list[Result]:
    """Of the tiny reward model, in lists and one at a time."""
    from rlhf_ray.reward.model import RewardModel

    lines = (data / "tiny/pairs_test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines][:64]
    prompts = [row["prompt"] for row in rows]
    responses = [row["chosen"] for row in rows]
    model = data / "tiny/reward_model"
    results = []
    scores = {}
    for name, settings in (
        ("CPU, float32", {"dtype": "float32"}),
        ("GPU, float32", {"dtype": "float32", "gpus": 1}),
        ("GPU, bfloat16", {"dtype": "bfloat16", "gpus": 1}),
        ("GPU, bfloat16, batch-invariant", {"dtype": "bfloat16", "gpus": 1, "batch_invariant": True}),
    ):
        reward = RewardModel.load(model, **settings)
        scores[name] = np.array(reward.score(prompts, responses))
        alone = np.array([reward.score(*turn) for turn in zip(prompts, responses, strict=True)])
        moved = float(np.abs(alone - scores[name]).max())
        invariant = "invariant" in name
        results.append(Result(f"{name}: moved by its batch", moved, target="<= 0" if invariant else None))
    spread = float(scores["CPU, float32"].std())
    for name, bound in (
        ("GPU, float32", 1e-3),
        ("GPU, bfloat16", 0.1),
        ("GPU, bfloat16, batch-invariant", 0.1),
    ):
        error = float(np.abs(scores[name] - scores["CPU, float32"]).max()) / spread
        results.append(Result(f"{name}: largest distance from the CPU's, of their spread", error, target=f"<= {bound}"))
    return results


def run_command(name: str, command: str, config: str, logs: Path, settings: Sequence[str]) -> tuple[str, int, Path]:
    """One run in a folder of its own; gives its name, status and folder."""
    slug = "".join(letter if letter.isalnum() else "-" for letter in name)
    folder = logs / slug
    folder.mkdir(parents=True)
    arguments = [sys.executable, "-m", "rlhf_ray", command, config, f"run.name={slug}", f"paths.runs={folder}"]
    with (folder / "output").open("w") as output:
        try:
            status = subprocess.run(
                [*arguments, "tracking.progress=lines", *settings],
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=DEADLINE_S,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
    if status:
        print(f"--- {name}: {status}\n{(folder / 'output').read_text()[-1500:]}", flush=True)
    return name, status, folder / slug


def rows_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ppo_results(name: str, status: int, folder: Path, steps: int = STEPS) -> list[Result]:
    rows = rows_of(folder)
    results = [
        Result(f"{name}: status", status, target="<= 0"),
        Result(f"{name}: steps", len(rows), target=f">= {steps}"),
    ]
    if not rows:
        return results
    for key, unit in (
        ("sync/max_abs_dlogp", "nats"), ("sync/change", "nats"), ("sync/residual", "nats"),
        ("mismatch/kl", "nats"), ("mismatch/max_abs_dlogp", "nats"),
        ("time/step_s", "s"), ("time/generate_s", "s"), ("time/sync_s", "s"), ("time/train_s", "s"),
    ):  # fmt: skip
        values = [row[key] for row in rows[1:] or rows if row.get(key) is not None]
        if values:
            results.append(Result(f"{name}: {key}", statistics.median(values), unit))
    return results


def all_runs(address: str, data: Path, logs: Path, chosen: Sequence[str]) -> list[Result]:
    common = [f"cluster.address={address}", f"paths.data={data}"]
    jobs = [(name, "ppo", "configs/tiny/ppo.yaml", settings) for name, settings in RUNS.items()]
    trained = ("scorer.gpus=0.5", "learner.gpus=1", "learner.dtype=bfloat16", "learner.replicas=2")
    jobs.insert(1, ("train-rm on two ranks", "train-rm", "configs/tiny/reward_model.yaml", trained))
    jobs = [job for job in jobs if not chosen or any(part in job[0] for part in chosen)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        done = list(pool.map(lambda job: run_command(job[0], job[1], job[2], logs, [*common, *job[3]]), jobs))
    results = []
    for name, status, folder in done:
        if name.startswith("PPO"):
            results += ppo_results(name, status, folder)
        else:
            results.append(Result(f"{name}: status", status, target="<= 0"))
    return results


def large_policy(data: Path, folder: Path) -> Path:
    """1.3 B parameters with the tiny model's vocabulary, so that every id that is sampled is a token."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(data / "tiny/policy")
    vocabulary = json.loads((data / "tiny/policy/config.json").read_text(encoding="utf-8"))["vocab_size"]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    for path in (data / "tiny/policy").glob("*token*"):
        shutil.copy(path, folder)
    del model
    torch.cuda.empty_cache()
    return folder


def large_results(address: str, data: Path, logs: Path) -> list[Result]:
    policy = large_policy(data, logs / "large-policy")
    settings = [
        *(setting for setting in PLACES if "kv_cache" not in setting), *BFLOAT16,
        f"cluster.address={address}", f"paths.data={data}", f"policy.model={policy}",
        "generator.enforce_eager=false", "generator.gpu_memory_utilization=0.15",
        "generator.max_concurrent_sequences=256",
        "policy.learner.gradient_checkpointing=true", "critic.learner.gradient_checkpointing=true",
        "policy.learner.micro_batch_tokens=16384", "critic.learner.micro_batch_tokens=16384",
        "reference.micro_batch_tokens=16384", "policy.learner.learning_rate=1e-6", "critic.learner.learning_rate=1e-6",
        "sampling.prompts_per_step=64", "sampling.samples_per_prompt=4", "sampling.prompts_per_shard=16",
        "sampling.max_response_tokens=256", "reward.on_too_long=truncate", "evaluation.prompts=null",
        "checkpoint.every_steps=1000", "algorithm.max_staleness=1", "policy.learner.cpus=2",
    ]  # fmt: skip
    with GpuMemory() as memory:
        name, status, folder = run_command("PPO of 1.3 B", "ppo", "configs/tiny/ppo.yaml", logs, settings)
    results = ppo_results(name, status, folder)
    for role, used in sorted(memory.device.items()):
        results.append(Result(f"{name}: {role[:60]} on the GPU", used / 1e9, "GB"))
        results.append(Result(f"{name}: {role[:60]} on the host", memory.host[role] / 1e9, "GB"))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data").absolute())
    parser.add_argument("--parts", default="kernel,scoring,runs,large")
    parser.add_argument("--runs", default="", help="only runs with one of these, comma-separated, in their name")
    parser.add_argument("--keep", type=Path, help="folder to leave the runs in")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    site = Path(__file__).parent / "one_card"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    os.environ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
    os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    report = Report("one_gpu")
    with tempfile.TemporaryDirectory() as temporary:
        logs = (arguments.keep or Path(temporary)).absolute()
        logs.mkdir(parents=True, exist_ok=True)
        if "kernel" in parts:
            report.add(kernel_results(), "kernel")
        if "scoring" in parts:
            report.add(scoring_results(arguments.data), "scoring")
        if "runs" in parts or "large" in parts:
            with many_gpus(64) as address:
                if "runs" in parts:
                    chosen = [part for part in arguments.runs.split(",") if part]
                    report.add(all_runs(address, arguments.data, logs, chosen), "runs")
                if "large" in parts:
                    report.add(large_results(address, arguments.data, logs), "large")


if __name__ == "__main__":
    main()
