"""A pass that begins behind the frozen layers is the pass that began at the first one."""

from typing import Any

import pytest
import torch

from rlhf_ray.models.trunk import FrozenTrunk

TOKENS = torch.tensor([[5, 9, 2, 17, 30, 4]])
SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
}


def model_of(architecture: str) -> tuple[Any, list[torch.nn.Module]]:
    import transformers

    torch.manual_seed(0)
    if architecture == "GPT2":
        config = transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=4, n_head=2, n_positions=32)
        model = transformers.GPT2LMHeadModel(config)
        return model.eval(), list(model.transformer.h)
    model = getattr(transformers, f"{architecture}ForCausalLM")(getattr(transformers, f"{architecture}Config")(**SMALL))
    return model.eval(), list(model.model.layers)


@pytest.mark.parametrize("architecture", ["Llama", "Qwen3", "Gemma2", "Granite", "GPT2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_and_gradients_are_those_of_the_whole_pass(architecture: str, checkpointing: bool):
    model, layers = model_of(architecture)
    for layer in layers[:3]:
        layer.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(False)
    if checkpointing:
        model.train()
        model.config.attn_pdrop = model.config.resid_pdrop = model.config.embd_pdrop = 0.0
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    computed = []
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: computed.append(number))
    whole = model(TOKENS, use_cache=False).logits
    whole.sum().backward()
    expected = [parameter.grad.clone() for parameter in layers[3].parameters()]
    model.zero_grad()

    trunk = FrozenTrunk(layers[:3])
    computed.clear()
    with torch.no_grad():
        states = trunk.states(lambda: model(TOKENS, use_cache=False))
    assert states.shape == (1, 6, 32)
    assert computed == [0, 1], "the third ends the pass, the fourth is not reached"
    with trunk.begun_at(states):
        begun = model(TOKENS, use_cache=False).logits
        begun.sum().backward()
    assert torch.equal(begun, whole)
    for parameter, gradient in zip(layers[3].parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert torch.equal(model(TOKENS, use_cache=False).logits, whole), "without states it is the whole pass again"


def test_a_pass_that_goes_elsewhere_is_an_error():
    trunk = FrozenTrunk([torch.nn.Linear(2, 2)])
    with pytest.raises(RuntimeError, match="did not come to the last frozen layer"):
        trunk.states(lambda: None)
    with pytest.raises(ValueError, match="at least one"):
        FrozenTrunk([])
