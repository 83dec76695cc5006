"""The wiring of vLLM's NCCL transport, with stubs where GPUs would be: vLLM's own trainer engine runs, no bytes do."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from vllm.distributed.weight_transfer import nccl_engine
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo

from rlhf_ray.config.lora import LoraSettings
from rlhf_ray.models.adapters import adapter_parameters, add_adapters, plain_weights
from rlhf_ray.roles.weight_sender import LearnerWeightSource, open_sender, update_info
from rlhf_ray.runtime import weight_transfer
from rlhf_ray.runtime.answers import Answer, Assembly
from rlhf_ray.runtime.weight_transfer import NcclTransport, ObjectStoreTransport, Published, probe_rows


@dataclass
class StubReplica:
    """Stands for a `Replica`: writes down what it is asked, and answers what it was told to."""

    name: str
    calls: list[tuple[str, str, tuple[Any, ...]]]
    answers: dict[str, Any] = field(default_factory=dict)

    @property
    def beside(self) -> "StubReplica":
        return self

    def ask(self, method: Any, *args: Any) -> Answer[Any]:
        self.calls.append((self.name, method.__name__, args))
        return Answer(self.answers.get(method.__name__), self.name, "here", method.__name__)


def stubs(role: str, size: int, **answers: Any) -> tuple[list[StubReplica], list[tuple[str, str, tuple[Any, ...]]]]:
    calls: list[tuple[str, str, tuple[Any, ...]]] = []
    return [StubReplica(f"{role}-{index}", calls, answers) for index in range(size)], calls


def source(kind: type[LearnerWeightSource] = LearnerWeightSource) -> LearnerWeightSource:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.model.norm.to(torch.float32)
    return kind(model, plain_weights(model))


def test_metadata_says_what_iteration_gives():
    sent = source()
    for _ in range(2):
        given = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in sent]
        assert given == [(meta.name, meta.dtype, meta.shape) for meta in sent.metadata()]
    names = [meta.name for meta in sent.metadata()]
    assert names[0] == "model.embed_tokens.weight"
    assert "lm_head.weight" not in names, "tied weights travel once"
    told = update_info(sent)
    assert told["names"] == names
    assert set(told["dtype_names"]) == {"bfloat16", "float32"}
    assert told["shapes"][0] == [32, 16]


def test_metadata_of_partitioned_weights_has_their_full_shape():
    """ZeRO-3 leaves an empty tensor and notes the shape."""
    sent = source()
    before = sent.metadata()
    for weight in sent._weights.values():
        weight.parameter.ds_shape = weight.parameter.shape  # type: ignore[attr-defined]
        weight.parameter.data = torch.empty(0)
    assert [meta.shape for meta in sent.metadata()] == [meta.shape for meta in before]


def test_adapters_are_sent_merged():
    """Under the names and shapes of the plain model, with the values that a directory gets."""
    model = source()._model
    add_adapters(model, LoraSettings(rank=2, target_modules=["q_proj"]), "policy.lora.target_modules", seed=0)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.normal_()
    weights = {name: weight for name, weight in plain_weights(model).items() if weight.is_sent}
    sent = LearnerWeightSource(model, weights)
    given = dict(sent)
    assert [(meta.name, meta.dtype, meta.shape) for meta in sent.metadata()] == [
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in given.items()
    ]
    attention = [f"model.layers.{layer}.self_attn.{side}_proj.weight" for layer in range(2) for side in "qkvo"]
    assert list(given) == attention
    for layer in range(2):
        adapted = model.model.layers[layer].self_attn.q_proj
        down, up = (part.weight.float() for part in (adapted.lora_A["default"], adapted.lora_B["default"]))
        expected = (adapted.base_layer.weight.float() + 16 * (up @ down)).bfloat16()
        assert torch.equal(given[f"model.layers.{layer}.self_attn.q_proj.weight"], expected)


PROOF: Any = Assembly(dict, {})
GROUP = {
    "master_address": "10.0.0.1",
    "master_port": 4711,
    "world_size": 3,
    "packed": True,
    "packed_buffer_size_bytes": 3 << 20,
    "packed_num_buffers": 2,
}


def test_vllms_sender_broadcasts_without_asking_the_engines(monkeypatch: pytest.MonkeyPatch):
    """A handshake and two rounds of vLLM's trainer engine; only NCCL itself is a stub."""
    broadcast: list[list[str]] = []
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: f"stub group of {info.world_size}")

    def producer(iterator: Any, **kwargs: Any) -> None:
        assert (kwargs["buffer_size_bytes"], kwargs["num_buffers"]) == (3 << 20, 2)
        broadcast.append([name for name, _ in iterator])

    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", producer)
    sent = source()
    sender = open_sender(sent, 0, GROUP)
    for _ in range(2):
        sender.send_weights()
    assert broadcast == [update_info(sent)["names"]] * 2


def test_other_ranks_only_take_part_in_gathering():
    passes = []

    class CountingSource(LearnerWeightSource):
        def __iter__(self) -> Any:
            passes.append(1)
            return super().__iter__()

    sender = open_sender(source(CountingSource), 1, GROUP)
    sender.send_weights()
    assert passes == [1]


def test_both_sides_are_asked_by_the_driver_and_waited_for_together(monkeypatch: pytest.MonkeyPatch):
    """An engine that fails before it joins the broadcast must end the wait for the sender that waits in it."""
    policy, asked_policy = stubs("policy", 2, open_sender={"names": ["a"]})
    generators, asked_generators = stubs("generator", 3)
    collected: list[list[Answer[Any]]] = []

    def collect(answers: list[Answer[Any]], timeout_s: float) -> list[Any]:
        collected.append(list(answers))
        return [answer.reference for answer in answers]

    monkeypatch.setattr(weight_transfer, "meeting_point", lambda group: ("10.0.0.1", 4711))
    monkeypatch.setattr(weight_transfer, "collect", collect)
    transport = NcclTransport(policy, generators, 4, bucket_mib=3, timeout_s=9.0)  # type: ignore[arg-type]
    assert len(collected[0]) == 5, "nobody is waited for before all are asked: they meet each other"
    assert {args[0]["world_size"] for _, _, args in [*asked_policy, *asked_generators]} == {13}
    infos = [args[0] for _, _, args in asked_generators]
    assert [info["rank_offset"] for info in infos] == [1, 5, 9], "each engine has its own ranks"
    for info in infos:
        NCCLWeightTransferInitInfo(**info)

    for version in (1, 2):
        asked_policy.clear()
        asked_generators.clear()
        owed: list[Answer[Any]] = [Answer(f"older-{version}", "generator-0", "here", "generate")]  # type: ignore[arg-type]
        published = transport.publish(version, PROOF, owed)
        assert collected[-1] == owed, "older weights are gone with the broadcast"
        assert [name for _, name, _ in asked_policy] == ["broadcast_weights"] * 2
        assert [(name, args) for _, name, args in asked_generators] == [("receive", ({"names": ["a"]}, version))] * 3
        assert len(published.answers) == 5


def test_the_first_ranks_buckets_go_to_all_in_order(monkeypatch: pytest.MonkeyPatch):
    policy, asked = stubs("policy", 2)
    layout = [("a", "b"), ("c",)]
    monkeypatch.setattr(weight_transfer, "collect", lambda answers, timeout_s: [layout] * len(answers))
    transport = ObjectStoreTransport(policy, bucket_mib=3, timeout_s=9.0)  # type: ignore[arg-type]
    assert [(name, args) for _, name, args in asked] == [("weight_layout", (3 << 20,))] * 2
    asked.clear()
    published: Published = transport.publish(7, PROOF, ())
    assert [(rank, args) for rank, _, args in asked] == [
        ("policy-0", (0,)),
        ("policy-1", (0,)),
        ("policy-0", (1,)),
        ("policy-1", (1,)),
    ], "every rank gathers every bucket, in the same order"
    fields = published.snapshot.fields  # type: ignore[attr-defined]
    assert (fields["version"], fields["names"], fields["proof"]) == (7, {"a", "b", "c"}, PROOF)
    assert [answer.role for answer in fields["buckets"].items] == ["policy-0", "policy-0"]
    assert [answer.role for answer in published.answers] == ["policy-1", "policy-1"]


@pytest.mark.parametrize(("num_tokens", "context_tokens", "rows"), [(256, 100, 4), (10, 100, 1), (64, 17, 4)])
def test_the_probe_is_made_of_the_prompts(num_tokens: int, context_tokens: int, rows: int):
    prompts = [np.arange(start, start + 5, dtype=np.int32) for start in range(0, 500, 5)]
    probe = probe_rows(prompts, num_tokens, context_tokens)
    assert len(probe) == rows
    assert np.concatenate(probe).tolist() == list(range(sum(map(len, probe))))
    assert max(map(len, probe)) < context_tokens
    short = probe_rows(prompts[:1], num_tokens, context_tokens)
    assert np.concatenate(short).tolist()[:7] == [0, 1, 2, 3, 4, 0, 1], "what is too short is repeated"
