"""What a PPO step should cost on GPUs, by arithmetic. Nothing here has been run: `python -m bench.costs` writes the
tables of docs/scaling.md, and a test checks that page and code agree.

Every time is the larger of what its arithmetic and its bytes take, each at a stated share of the hardware's peak.
Factors that cost a few per cent (norms, sampling, launches, scheduling) are left to those shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.config.load import load_config
from rlhf_ray.config.settings import LearnerSettings, PPOConfig

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "scaling.md"
_BEGIN, _END = "<!-- begin: python -m bench.costs -->", "<!-- end -->"
_BF16, _FLOAT32 = 2, 4
_ADAMW_STATE = 3 * _FLOAT32
"""Bytes a parameter: master weight and two moments."""


@dataclass(frozen=True)
class Hardware:
    """One GPU among others.

    Attributes:
        flops: dense bfloat16, per second.
        memory_bandwidth: of its own memory, bytes per second.
        memory: bytes.
        node_bandwidth: to the GPUs of its node, bytes per second in each direction.
        network_bandwidth: its share of the node's network, bytes per second in each direction.
        gpus_per_node: with as many network adapters.
        compute_share, memory_share, link_share: of these peaks that a large kernel or transfer is assumed to reach.
    """

    flops: float = 989e12
    memory_bandwidth: float = 3.35e12
    memory: float = 80e9
    node_bandwidth: float = 450e9
    network_bandwidth: float = 50e9
    gpus_per_node: int = 8
    compute_share: float = 0.4
    memory_share: float = 0.7
    link_share: float = 0.7

    def compute_s(self, flops: float, gpus: float) -> float:
        """Arithmetic shared evenly by GPUs."""
        return flops / (gpus * self.flops * self.compute_share)

    def read_s(self, num_bytes: float, gpus: float) -> float:
        """Bytes of GPU memory read or written once, shared evenly by GPUs."""
        return num_bytes / (gpus * self.memory_bandwidth * self.memory_share)

    def gather_s(self, num_bytes: float, gpus: int) -> float:
        """An all-gather (or reduce-scatter) of so many bytes in all.

        Each GPU receives what it does not hold, (n − 1)/n of them, over the links in its node. In rings through all
        network adapters a node receives the other nodes' part once, so its adapters carry it together.
        """
        nodes = max(gpus // self.gpus_per_node, 1)
        in_node = num_bytes * (gpus - 1) / gpus / self.node_bandwidth
        network = num_bytes * (nodes - 1) / nodes / (self.gpus_per_node * self.network_bandwidth)
        return max(in_node, network) / self.link_share


@dataclass(frozen=True)
class Model:
    """A decoder with grouped-query attention and a gated MLP.

    Attributes:
        tied: the output projection is the embedding.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool = False

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def matrices(self) -> int:
        """Parameters that every token is multiplied with: layers and output projection."""
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * self.head_size
        mlp = 3 * self.hidden * self.intermediate
        return self.layers * (attention + mlp) + self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        """Without biases and norms, which are less than a thousandth."""
        return self.matrices + (0 if self.tied else self.hidden * self.vocabulary)

    @property
    def weight_bytes(self) -> int:
        """In bfloat16."""
        return _BF16 * self.parameters

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token in bfloat16."""
        return 2 * self.layers * self.kv_heads * self.head_size * _BF16

    def forward_flops(self, tokens: float, length: float) -> float:
        """A multiplication and an addition for each weight and token; attention sees half a sequence on average.

        Args:
            tokens: in all.
            length: of the sequences they are in.
        """
        attention = 2 * 2 * self.layers * self.hidden * length / 2
        return tokens * (2 * self.matrices + attention)


QWEN_1_5B = Model("1.5 B", 28, 1536, 12, 2, 8960, 151_936, tied=True)
QWEN_7B = Model("7 B", 28, 3584, 28, 4, 18_944, 152_064)
QWEN_32B = Model("32 B", 64, 5120, 40, 8, 27_648, 152_064)
QWEN_72B = Model("72 B", 80, 8192, 64, 8, 29_568, 152_064)


@dataclass(frozen=True)
class Case:
    """A configuration, with the sizes of its models and the lengths that are assumed.

    Attributes:
        prompt_tokens, response_tokens: of the average sample; the longest response has all tokens that are allowed.
    """

    file: str
    policy: Model
    critic: Model
    reward: Model
    prompt_tokens: float = 256.0
    response_tokens: float = 512.0

    @property
    def config(self) -> PPOConfig:
        return load_config(PPOConfig, REPOSITORY / "configs" / self.file)

    @property
    def length(self) -> float:
        return self.prompt_tokens + self.response_tokens


CASES = (
    Case("node-8gpu/ppo.yaml", QWEN_7B, QWEN_1_5B, QWEN_7B),
    Case("multi-node/ppo-70b.yaml", QWEN_72B, QWEN_7B, QWEN_32B),
)


@dataclass(frozen=True)
class Part:
    """One part of a step.

    Attributes:
        seconds: it takes.
        bound_by: what of its resources it waits for.
    """

    name: str
    seconds: float
    bound_by: str


def _slowest(name: str, times: dict[str, float]) -> Part:
    bound_by = max(times, key=lambda resource: times[resource])
    return Part(name, times[bound_by], bound_by)


def prefill(model: Model, hardware: Hardware, samples: float, prompt_tokens: float, gpus: int) -> Part:
    """Keys and values of the prompts of one engine's samples."""
    flops = model.forward_flops(samples * prompt_tokens, prompt_tokens)
    times = {"arithmetic": hardware.compute_s(flops, gpus), "memory": hardware.read_s(model.weight_bytes, gpus)}
    return _slowest("generator: prefill", times)


def decode(
    model: Model,
    hardware: Hardware,
    samples: float,
    prompt_tokens: float,
    response_tokens: float,
    longest: int,
    gpus: int,
) -> Part:
    """One engine's responses, all in flight at once.

    Each of the `longest` engine steps reads all weights once, and the keys and values of the sequences that have not
    ended: Σ over samples of Σ_{t < r} (p + t) = r·p + r²/2 tokens each (with the average r; a spread of lengths adds
    half its variance).
    """
    cached = samples * (response_tokens * prompt_tokens + response_tokens**2 / 2)
    flops = model.forward_flops(samples * response_tokens, 2 * (prompt_tokens + response_tokens / 2))
    times = {
        "memory: weights and keys": hardware.read_s(longest * model.weight_bytes + cached * model.kv_bytes, gpus),
        "arithmetic": hardware.compute_s(flops, gpus),
    }
    return _slowest("generator: decode", times)


def forward(
    name: str, model: Model, hardware: Hardware, tokens: float, length: float, gpus: float, gathered_tokens: int | None
) -> Part:
    """Forward passes over all tokens, shared by the GPUs.

    Args:
        gathered_tokens: of one pass, where the weights are gathered for each (ZeRO-3); None where they are there.
    """
    times = {"arithmetic": hardware.compute_s(model.forward_flops(tokens, length), gpus)}
    if gathered_tokens is not None:
        passes = max(tokens / gpus / gathered_tokens, 1.0)
        times["links: gathering weights"] = passes * hardware.gather_s(model.weight_bytes, int(gpus))
    return _slowest(name, times)


def training(
    name: str, model: Model, hardware: Hardware, tokens: float, length: float, epochs: int, learner: LearnerSettings
) -> Part:
    """Forward and backward passes of all epochs: three forward passes' arithmetic, four where activations are computed
    again. ZeRO-3 gathers the weights for each of these passes, and reduces gradients in float32 after each
    micro-batch."""
    gpus, again = learner.replicas, learner.gradient_checkpointing
    flops = (4 if again else 3) * epochs * model.forward_flops(tokens, length)
    times = {"arithmetic": hardware.compute_s(flops, gpus)}
    if gpus > 1:
        passes = epochs * max(tokens / gpus / learner.micro_batch_tokens, 1.0)
        gathers = ((3 if again else 2) if learner.zero_stage == 3 else 0) * model.weight_bytes
        times["links: weights and gradients"] = passes * hardware.gather_s(gathers + _FLOAT32 * model.parameters, gpus)
    return _slowest(name, times)


def optimizer(name: str, model: Model, hardware: Hardware, updates: int, gpus: int) -> Part:
    """AdamW reads and writes master weight and moments, reads the gradient, writes the weight: 30 bytes a parameter."""
    num_bytes = updates * model.parameters * (2 * _ADAMW_STATE + _FLOAT32 + _BF16)
    return Part(name, hardware.read_s(num_bytes, gpus), "memory")


def weight_sync(model: Model, hardware: Hardware, learner_gpus: int, same_node: bool) -> Part:
    """One learner rank broadcasts all weights in bfloat16, after ZeRO-3 has gathered them; every engine receives them
    at the same time."""
    link = hardware.node_bandwidth if same_node else hardware.network_bandwidth
    broadcast = model.weight_bytes / (link * hardware.link_share)
    times = {
        "links: one rank's broadcast": broadcast,
        "links: gathering weights": hardware.gather_s(model.weight_bytes, learner_gpus),
    }
    return _slowest("weight sync", times)


@dataclass(frozen=True)
class Step:
    """A step's parts by what can go on at the same time.

    Attributes:
        sampling: one after another, while the columns of finished shards are computed.
        columns: beside sampling, on GPUs of their own.
        policy, critic: beside each other, each one after another.
        sync: after the policy has learned.
    """

    sampling: tuple[Part, ...]
    columns: tuple[Part, ...]
    policy: tuple[Part, ...]
    critic: tuple[Part, ...]
    sync: Part

    @property
    def parts(self) -> tuple[Part, ...]:
        return (*self.sampling, *self.columns, *self.policy, *self.critic, self.sync)

    @property
    def sampling_half_s(self) -> float:
        return max(_total(self.sampling), *(part.seconds for part in self.columns))

    @property
    def learning_half_s(self) -> float:
        return max(_total(self.policy), _total(self.critic))

    @property
    def synchronous_s(self) -> float:
        """`max_staleness` 0: the two halves one after the other."""
        return self.sampling_half_s + self.learning_half_s + self.sync.seconds

    @property
    def overlapped_s(self) -> float:
        """`max_staleness` 1: the two halves beside each other, for as long as the longer one takes."""
        return max(self.sampling_half_s, self.learning_half_s) + self.sync.seconds


def _total(parts: Sequence[Part]) -> float:
    return sum(part.seconds for part in parts)


def step_of(case: Case, hardware: Hardware) -> Step:
    """All parts of one step of a configuration."""
    config = case.config
    generator, sampling, algorithm = config.generator, config.sampling, config.algorithm
    critic, reference = config.critic, config.reference
    assert critic is not None, "both configurations have one"
    assert reference is not None, "both configurations have one"
    samples = sampling.prompts_per_step * sampling.samples_per_prompt
    tokens, length = samples * case.length, case.length
    own, engine_gpus, longest = samples / generator.replicas, generator.tensor_parallel, sampling.max_response_tokens
    learner, critic_learner = config.policy.learner, critic.learner
    updates = algorithm.epochs * algorithm.minibatches

    def column(name: str, model: Model, settings: LearnerSettings) -> Part:
        gathered = settings.micro_batch_tokens if settings.zero_stage == 3 and settings.replicas > 1 else None
        return forward(name, model, hardware, tokens, length, settings.replicas, gathered)

    return Step(
        sampling=(
            prefill(case.policy, hardware, own, case.prompt_tokens, engine_gpus),
            decode(case.policy, hardware, own, case.prompt_tokens, case.response_tokens, longest, engine_gpus),
        ),
        columns=(
            forward(
                "reference: log-probs",
                case.policy,
                hardware,
                tokens,
                length,
                reference.replicas * reference.gpus,
                reference.micro_batch_tokens if reference.sharded else None,
            ),
            forward(
                "reward: scores",
                case.reward,
                hardware,
                tokens,
                length,
                sum(source.replicas * source.gpus for source in config.reward),
                None,
            ),
        ),
        policy=(
            *([column("policy: old log-probs", case.policy, learner)] if algorithm.asks_old_logprobs else []),
            training("policy: learning", case.policy, hardware, tokens, length, algorithm.epochs, learner),
            optimizer("policy: AdamW", case.policy, hardware, updates, learner.replicas),
        ),
        critic=(
            column("critic: values", case.critic, critic_learner),
            training("critic: learning", case.critic, hardware, tokens, length, algorithm.epochs, critic_learner),
            optimizer("critic: AdamW", case.critic, hardware, updates, critic_learner.replicas),
        ),
        sync=weight_sync(
            case.policy, hardware, learner.replicas, generator.replicas * engine_gpus + learner.replicas <= 8
        ),
    )


def memory_of(case: Case) -> dict[str, float]:
    """Bytes on one GPU of each role that do not depend on a pass's size: weights, gradients in float32 and AdamW; for
    the generator the keys and values of its longest sequences beside the weights."""
    config = case.config
    generator, sampling, critic, reference = config.generator, config.sampling, config.critic, config.reference
    assert critic is not None, "both configurations have one"
    assert reference is not None, "both configurations have one"
    own = sampling.prompts_per_step * sampling.samples_per_prompt / generator.replicas
    longest = sampling.max_prompt_tokens + sampling.max_response_tokens

    def trained(model: Model, learner: LearnerSettings) -> float:
        share = learner.replicas if learner.zero_stage == 3 else 1
        return model.weight_bytes / share + model.parameters * (_FLOAT32 + _ADAMW_STATE) / learner.replicas

    return {
        "generator": (case.policy.weight_bytes + own * longest * case.policy.kv_bytes) / generator.tensor_parallel,
        "policy": trained(case.policy, config.policy.learner),
        "critic": trained(case.critic, critic.learner),
        "reference": case.policy.weight_bytes / (reference.replicas if reference.sharded else 1),
        "reward": float(case.reward.weight_bytes),
    }


def tables() -> str:
    """The generated part of the page."""
    hardware = Hardware()
    lines = []
    for case in CASES:
        step, config = step_of(case, hardware), case.config
        samples = config.sampling.prompts_per_step * config.sampling.samples_per_prompt
        lines += [
            f"### `configs/{case.file}`",
            "",
            f"{samples} samples of {case.prompt_tokens:g} + {case.response_tokens:g} tokens on average, the longest "
            f"response {config.sampling.max_response_tokens}; {config.algorithm.epochs} epochs. *Computed, not run.*",
            "",
            "| part | seconds | bound by |",
            "|---|---:|---|",
            *(f"| {part.name} | {part.seconds:.2f} | {part.bound_by} |" for part in step.parts),
            f"| **sampling half** | **{step.sampling_half_s:.1f}** | |",
            f"| **learning half** | **{step.learning_half_s:.1f}** | |",
            f"| **step, synchronous** (sum) | **{step.synchronous_s:.1f}** | |",
            f"| **step, `max_staleness: 1`** (the longer half) | **{step.overlapped_s:.1f}** | |",
            "",
            f"Overlapped, a step takes 1/{step.synchronous_s / step.overlapped_s:.2f} of the time. "
            f"Sent in a sync: {case.policy.weight_bytes / 1e9:.0f} GB.",
            "",
            "| GB on one GPU | "
            + " | ".join(f"{role} {size / 1e9:.0f}" for role, size in memory_of(case).items())
            + " |",
            "|---|---|---|---|---|---|",
            "",
        ]
    return "\n".join(lines)


def page_with(page: str, generated: str) -> str:
    """The page with its generated part replaced."""
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n{generated}{_END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")
