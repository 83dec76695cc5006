"""The wiring of vLLM's NCCL transport, with stubs where GPUs would be: vLLM's own trainer engine runs, no bytes do."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from vllm.distributed.weight_transfer import nccl_engine

from rlhf_ray.config.settings import WeightSettings
from rlhf_ray.models.token_models import CriticModel, PolicyModel
from rlhf_ray.roles.weight_sender import LearnerWeightSource, open_sender
from rlhf_ray.runtime import weight_transfer
from rlhf_ray.runtime.weight_transfer import GeneratorClient, NcclTransport, ObjectStoreTransport, open_transport


@dataclass
class StubGroup:
    """Stands for an `ActorGroup`: writes down what each replica is asked."""

    size: int
    calls: list[tuple[int | str, str, tuple[Any, ...]]] = field(default_factory=list)

    def __len__(self) -> int:
        return self.size

    def submit(self, index: int, method: str, *args: Any) -> list[str]:
        self.calls.append((index, method, args))
        return [f"{method}-{index}"]

    def call_all(self, method: str, *args: Any) -> list[None]:
        self.calls.append(("all", method, args))
        return [None] * self.size

    def stream_all(self, method: str, *args: Any) -> list[list[str]]:
        self.calls.append(("all", method, args))
        return [["first", "second"], []]

    def wait(self, pending: list[Any]) -> list[None]:
        self.calls.append(("wait", ", ".join(pending), ()))
        return [None] * len(pending)

    def named(self, method: str) -> list[tuple[Any, ...]]:
        """Arguments of every call of a method."""
        return [args for _, name, args in self.calls if name == method]


def module() -> PolicyModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = PolicyModel(LlamaForCausalLM(config).to(torch.bfloat16))
    model.language_model.model.norm.to(torch.float32)
    return model


def test_metadata_says_what_iteration_gives():
    source = LearnerWeightSource(module(), "language_model.")
    for _ in range(2):
        given = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source]
        assert given == [(meta.name, meta.dtype, meta.shape) for meta in source.metadata()]
    names = [meta.name for meta in source.metadata()]
    assert names[0] == "model.embed_tokens.weight"
    assert "lm_head.weight" not in names, "tied weights travel once"
    assert {meta.dtype for meta in source.metadata()} == {torch.bfloat16, torch.float32}


def test_metadata_of_partitioned_weights_has_their_full_shape():
    """ZeRO-3 leaves an empty tensor and notes the shape."""
    model = CriticModel(torch.nn.Linear(3, 5))
    weight = model.token_classifier.weight
    weight.ds_shape = torch.Size((5, 3))
    weight.data = torch.empty(0)
    [meta, _] = LearnerWeightSource(model, "token_classifier.").metadata()
    assert (meta.name, meta.shape) == ("weight", (5, 3))


@pytest.mark.parametrize("workers_each", [1, 4])
def test_each_engine_has_its_own_ranks(workers_each: int):
    generators = StubGroup(3)
    info = {"rank_offset": 1, "world_size": 1 + 3 * workers_each, "master_address": "10.0.0.1"}
    GeneratorClient(generators).init_weight_transfer_engine(info)  # type: ignore[arg-type]
    sent = [args[0] for args in generators.named("init_weight_transfer_engine")]
    assert [own["rank_offset"] for own in sent] == [1 + index * workers_each for index in range(3)]
    assert all(own["master_address"] == "10.0.0.1" and own["world_size"] == info["world_size"] for own in sent)
    # All are asked before any is waited for: they meet each other.
    assert [which for which, _, _ in generators.calls] == [0, 1, 2, "wait"]


def test_vllms_sender_drives_the_engines(monkeypatch: pytest.MonkeyPatch):
    """A handshake and two rounds of vLLM's trainer engine; only NCCL itself is a stub."""
    broadcast: list[list[str]] = []
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: f"stub group of {info.world_size}")
    monkeypatch.setattr(
        nccl_engine,
        "packed_nccl_broadcast_producer",
        lambda iterator, **kwargs: broadcast.append([name for name, _ in iterator]),
    )
    generators = StubGroup(2)
    client = GeneratorClient(generators)  # type: ignore[arg-type]
    source = LearnerWeightSource(module(), "language_model.")

    sender = open_sender(source, client, rank=0, address="10.0.0.1", port=4711, world_size=3)
    sent = [args[0] for args in generators.named("init_weight_transfer_engine")]
    assert [(own["rank_offset"], own["world_size"], own["master_port"]) for own in sent] == [(1, 3, 4711), (2, 3, 4711)]
    for version in (1, 2):
        generators.calls.clear()
        client.version = version
        sender.send_weights()
        assert [name for _, name, _ in generators.calls] == [
            "start_weight_update",
            "update_weights",
            "finish_weight_update",
        ]
        [(update,)] = generators.named("update_weights")
        assert update["names"] == broadcast[-1] == [meta.name for meta in source.metadata()]
        assert set(update["dtype_names"]) == {"bfloat16", "float32"}
        assert generators.named("finish_weight_update") == [(version,)]


def test_other_ranks_only_take_part_in_gathering():
    generators = StubGroup(1)
    passes = []

    class CountingSource(LearnerWeightSource):
        def __iter__(self) -> Any:
            passes.append(1)
            return super().__iter__()

    client = GeneratorClient(generators)  # type: ignore[arg-type]
    source = CountingSource(module(), "language_model.")
    engine = open_sender(source, client, rank=1, address="10.0.0.1", port=4711, world_size=2)
    engine._broadcast(source, source.metadata())
    assert passes == [1]
    assert generators.calls == []


def test_transport_opens_once_and_sends_by_version(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weight_transfer, "meeting_point", lambda group: ("10.0.0.1", 4711))
    policy, generators = StubGroup(2), StubGroup(3)
    transport = open_transport(WeightSettings(transport="nccl"), policy, generators, 4)  # type: ignore[arg-type]
    assert isinstance(transport, NcclTransport)
    [(client, address, port, world_size)] = policy.named("open_nccl_sender")
    assert (address, port, world_size) == ("10.0.0.1", 4711, 13)
    assert isinstance(client, GeneratorClient)
    transport.send(1)
    transport.send(2)
    assert policy.named("send_weights_nccl") == [(1,), (2,)]
    assert generators.calls == [], "engines hear from the learner alone"


def test_object_store_transport_hands_the_first_ranks_buckets_to_all():
    policy, generators = StubGroup(2), StubGroup(3)
    settings = WeightSettings(bucket_mib=3)
    transport = open_transport(settings, policy, generators, 1)  # type: ignore[arg-type]
    assert isinstance(transport, ObjectStoreTransport)
    transport.send(7)
    assert policy.named("weight_buckets") == [(3 << 20,)]
    [(buckets, version)] = generators.named("load_weights")
    assert (buckets.references, version) == (("first", "second"), 7)
