"""Log-probs, entropies and losses of them against a float64 log-softmax, and a critic that starts at zero."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_ray.models import token_loss
from rlhf_ray.models.loading import resolve_attention
from rlhf_ray.models.packing import pack
from rlhf_ray.models.token_loss import LogitTransform
from rlhf_ray.models.token_models import (
    CriticModel,
    PolicyModel,
    load_critic_model,
    load_policy_model,
    named_as_saved,
    shapes_as_saved,
)
from tests.making import SCORE_ROUNDING, largest_difference, weights_in

BATCH = pack([np.arange(3, 23, dtype=np.int32)], [1])
ADVANTAGES = torch.linspace(-1, 1, 19)
SIZES = {"vocab_size": 301, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
LLAMA = {**SIZES, "hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2}
GPT = {"vocab_size": 301, "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("Llama", LLAMA),
    "tied": ("Llama", {**LLAMA, "tie_word_embeddings": True}),
    "capped logits": ("Gemma2", {**LLAMA, "head_dim": 16, "final_logit_softcapping": 3.0}),
    "divided logits": ("Granite", {**LLAMA, "logits_scaling": 8.0}),
    "multiplied logits": ("Cohere", {**LLAMA, "logit_scale": 0.0625}),
    "a head with a bias": ("Phi", LLAMA),
    "no vocabulary of its own": ("GPT2", GPT),
}


def built(name: str) -> Any:
    """A randomly initialised model, whose logits are large enough for transforms to matter."""
    import transformers

    torch.manual_seed(0)
    kind, config = ARCHITECTURES[name]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**config))
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def loss_of(part: slice, logprobs: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
    """Like a policy's: not linear in the log-probs, and with an entropy bonus."""
    return (ADVANTAGES[part] * logprobs.exp() - 0.1 * entropies).sum()


def brute_force(model: Any, temperature: float) -> tuple[torch.Tensor, ...]:
    """Loss, log-probs and entropies from all logits at once, in float64, with autograd."""
    logits = model(input_ids=BATCH.input_ids, position_ids=BATCH.position_ids, use_cache=False).logits[0, :-1].double()
    distribution = torch.log_softmax(logits / temperature, -1)
    logprobs = distribution[torch.arange(19), BATCH.targets]
    entropies = -(distribution.exp() * distribution).sum(-1)
    return loss_of(slice(0, 19), logprobs, entropies), logprobs, entropies


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("rows", [19, 4])
def test_loss_and_gradients_against_all_logits_at_once(name: str, rows: int, monkeypatch: pytest.MonkeyPatch):
    """Float64 sums of 301 words; float32 hidden states and products are what both have in common."""
    monkeypatch.setattr(token_loss, "CHUNK_BYTES", {"cpu": rows * 301 * 4})
    model = built(name)
    expected, logprobs, entropies = brute_force(model, 0.7)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(expected, list(parameters.values()))
    chunked = PolicyModel(model, temperature=0.7)
    found, found_logprobs, found_entropies = chunked(BATCH, loss_of)
    assert chunked._head._understood
    torch.testing.assert_close(found_logprobs.double(), logprobs.detach(), rtol=0, atol=2e-5)
    torch.testing.assert_close(found_entropies.double(), entropies.detach(), rtol=0, atol=2e-5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(chunked(BATCH), found_logprobs, rtol=0, atol=0)
    assert not chunked(BATCH).requires_grad
    (2.0 * found).backward()
    # Both backward passes through the trunk are float32, with sums of up to 301 terms.
    bound = 301 * 2.0**-24 * max(float(gradient.abs().max()) for gradient in gradients)
    for (key, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        assert float((parameter.grad / 2 - gradient).abs().max()) <= bound, key


@pytest.mark.parametrize("rows", [19, 4])
def test_no_chunk_of_logits_is_larger_than_asked_for(rows: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(token_loss, "CHUNK_BYTES", {"cpu": rows * 301 * 4})
    sizes: list[int] = []
    apply_ = LogitTransform.apply_

    def seen(self: LogitTransform, logits: torch.Tensor) -> torch.Tensor:
        sizes.append(len(logits))
        return apply_(self, logits)

    monkeypatch.setattr(LogitTransform, "apply_", seen)
    PolicyModel(built("tied"))(BATCH, loss_of)[0].backward()
    sizes.remove(len(token_loss._PROBES))
    assert sum(sizes) == 19 + -19 % rows  # filled up, so that there are few shapes
    assert max(sizes) <= rows


def test_a_frozen_head_and_a_frozen_trunk_get_no_gradient():
    for frozen in ("head", "trunk"):
        model = built("untied")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_((name == "lm_head.weight") == (frozen == "trunk"))
        PolicyModel(model)(BATCH, loss_of)[0].backward()
        assert (model.lm_head.weight.grad is None) == (frozen == "head")
        assert (model.model.norm.weight.grad is None) == (frozen == "trunk")


def test_logits_that_are_not_understood_are_left_to_the_model(monkeypatch: pytest.MonkeyPatch):
    """An architecture that does something else to its logits gives the same results, from all logits at once."""
    monkeypatch.setattr(LogitTransform, "of", lambda config, temperature: LogitTransform(temperature=temperature))
    model = built("capped logits")
    expected, logprobs, _ = brute_force(model, 0.7)
    plain = PolicyModel(model, temperature=0.7)
    for _ in range(2):
        found, found_logprobs, _ = plain(BATCH, loss_of)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(found_logprobs.double(), logprobs.detach(), rtol=0, atol=2e-5)
    assert not plain._head._understood
    found.backward()
    assert model.lm_head.weight.grad.any()


def load(model: str, dtype: str, float32_logits: bool = True) -> PolicyModel:
    attention = resolve_attention("auto")
    return load_policy_model(
        model, dtype=dtype, attention=attention, temperature=1.0, float32_logits=float32_logits
    ).eval()


def test_float32_logits_of_a_bfloat16_model_are_not_rounded(policy_model: str):
    """The projection of the rounded hidden states is exact; its gradient reaches weights and hidden states."""
    exact, rounded = (load(policy_model, "bfloat16", float32_logits=wanted) for wanted in (True, False))
    seen: list[torch.Tensor] = []
    exact.language_model.model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    loss, logprobs, _ = exact(BATCH, loss_of)
    weight = exact.language_model.lm_head.weight
    assert weight.dtype == torch.bfloat16
    logits = seen[0][0, BATCH.predict_at].double() @ weight.double().T
    expected = torch.log_softmax(logits, -1)[torch.arange(19), BATCH.targets].detach()
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=1e-5)
    assert float((rounded(BATCH) - expected).abs().max()) > 1e-4
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.any()
    assert exact.language_model.model.embed_tokens.weight.grad.any()


def test_policy_projects_only_predicted_positions(policy_model: str):
    model = load(policy_model, "float32")
    seen: list[torch.Size] = []
    model.language_model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    batch = pack([np.arange(3, 23, dtype=np.int32), np.arange(30, 40, dtype=np.int32)], [15, 8])
    assert len(model(batch)) == 7
    assert seen[-1] == (7,)


def critic_of(model: str, dtype: str = "float32") -> CriticModel:
    return load_critic_model(model, dtype=dtype, attention=resolve_attention("auto")).eval()


def test_critic_starts_at_zero_and_reads_the_state_before_each_token(policy_model: str):
    critic = critic_of(policy_model)
    tokens = np.arange(3, 23, dtype=np.int32)
    assert critic(pack([tokens], [5])).tolist() == [0.0] * 15
    torch.nn.init.normal_(critic.value_head.weight)
    values = critic(pack([tokens], [5]))
    tokens[-1] = 200
    assert torch.equal(critic(pack([tokens], [5])), values), "a value must not see the token it is the baseline of"
    tokens[-2] = 200
    assert critic(pack([tokens], [5]))[-1] != values[-1]


def test_a_critic_from_a_reward_model_starts_at_its_scores(tiny: Path):
    from transformers import AutoModelForSequenceClassification

    tokens = np.arange(3, 23, dtype=np.int32)
    values = critic_of(str(tiny / "reward_model"))(pack([tokens], [5]))
    reward_model = AutoModelForSequenceClassification.from_pretrained(tiny / "reward_model")
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    expected = [reward_model(ids[:, :length]).logits.item() for length in range(5, 20)]
    np.testing.assert_allclose(values.tolist(), expected, rtol=0, atol=SCORE_ROUNDING)


def test_values_of_a_bfloat16_critic_are_not_rounded(policy_model: str):
    critic = critic_of(policy_model, "bfloat16")
    torch.nn.init.normal_(critic.value_head.weight)
    values = critic(pack([np.arange(3, 23, dtype=np.int32)], [5]))
    assert values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float())


def mixture(kind: str) -> Any:
    import transformers

    sizes = {"num_local_experts": 4} if kind == "Mixtral" else {"num_experts": 4, "moe_intermediate_size": 48}
    config = getattr(transformers, f"{kind}Config")(**LLAMA, **sizes, head_dim=16, num_experts_per_tok=2)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_weights_have_the_names_that_save_pretrained_writes(kind: str, tmp_path: Path):
    """Fused experts come apart one parameter at a time, as the file has them; so do their shapes."""
    model = mixture(kind)
    model.save_pretrained(tmp_path)
    expected = weights_in(tmp_path)
    assert len(expected) > len(list(model.parameters())), "no experts were fused; this proves nothing"
    named = list(model.named_parameters())
    found = [saved for name, parameter in named for saved in named_as_saved(model, name, parameter.data)]
    assert len(found) == len(expected)
    assert largest_difference(dict(found), expected) == 0
    shapes = [(saved, t.shape) for name, parameter in named for saved, t in shapes_as_saved(model, name, parameter)]
    assert shapes == [(saved, tensor.shape) for saved, tensor in found]
