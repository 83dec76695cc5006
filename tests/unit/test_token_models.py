"""Log-probs against a float64 log-softmax, entropies with and without gradients, and a critic that starts at zero."""

import numpy as np
import pytest
import torch

from rlhf_ray.models.loading import resolve_attention
from rlhf_ray.models.packing import pack
from rlhf_ray.models.token_models import PolicyModel, load_critic_model, load_policy_model, logprobs_of
from tests.making import rounding

LOGITS = torch.randn(17, 301, generator=torch.Generator().manual_seed(0)) * 5
TARGETS = torch.randint(301, (17,), generator=torch.Generator().manual_seed(1))
# A log-prob is the difference of two numbers of at most about 30: a logit over its temperature, and the log of the sum
# of 301 exponentials, of which only the largest few matter.
ROUNDING = rounding(4, 30.0)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_logprobs_and_entropy_against_float64(temperature: float):
    logprobs, entropy = logprobs_of(LOGITS, TARGETS, temperature, "measured")
    expected = torch.log_softmax(LOGITS.double() / temperature, -1)
    assert logprobs.dtype == torch.float32
    assert entropy is not None
    torch.testing.assert_close(logprobs.double(), expected[torch.arange(17), TARGETS], rtol=0, atol=ROUNDING)
    torch.testing.assert_close(entropy.double(), -(expected.exp() * expected).sum(-1), rtol=0, atol=ROUNDING)


def test_bfloat16_logits_are_normalised_in_float32():
    logits = LOGITS.to(torch.bfloat16)
    logprobs, _ = logprobs_of(logits, TARGETS, 1.0, "none")
    expected = torch.log_softmax(logits.double(), -1)[torch.arange(17), TARGETS]
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=ROUNDING)


def test_only_the_differentiable_entropy_carries_a_gradient():
    logits = LOGITS.clone().requires_grad_()
    assert logprobs_of(logits, TARGETS, 1.0, "none")[1] is None
    logprobs, measured = logprobs_of(logits, TARGETS, 1.0, "measured")
    assert logprobs.requires_grad
    assert measured is not None
    assert not measured.requires_grad

    _, entropy = logprobs_of(logits, TARGETS, 0.7, "differentiable")
    assert entropy is not None
    [gradient] = torch.autograd.grad(entropy.sum(), logits)
    exact = LOGITS.double().requires_grad_()
    log_distribution = torch.log_softmax(exact / 0.7, -1)
    [expected] = torch.autograd.grad(-(log_distribution.exp() * log_distribution).sum(), exact)
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=1e-5)


def load(model: str, dtype: str, float32_logits: bool = True) -> PolicyModel:
    attention = resolve_attention("auto", on_gpu=False)
    return load_policy_model(
        model, dtype=dtype, attention=attention, temperature=1.0, float32_logits=float32_logits
    ).eval()


def test_float32_logits_of_a_bfloat16_model_are_not_rounded(policy_model: str):
    """The projection of the rounded hidden states is exact; its gradient reaches weights and hidden states."""
    batch = pack([np.arange(3, 23, dtype=np.int32)], [1])
    exact, rounded = (load(policy_model, "bfloat16", float32_logits=wanted) for wanted in (True, False))
    seen: list[torch.Tensor] = []
    exact.language_model.model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    logprobs, _ = exact(batch)
    weight = exact.language_model.lm_head.weight
    assert weight.dtype == torch.bfloat16
    logits = seen[0][0, batch.predict_at].double() @ weight.double().T
    expected, _ = logprobs_of(logits, batch.targets, 1.0, "none")
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)
    assert float((rounded(batch)[0] - expected).detach().abs().max()) > 1e-4
    logprobs.sum().backward()
    assert weight.grad is not None
    assert weight.grad.any()
    assert exact.language_model.model.embed_tokens.weight.grad.any()


def test_policy_projects_only_predicted_positions(policy_model: str):
    model = load(policy_model, "float32")
    seen: list[torch.Size] = []
    model.language_model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    batch = pack([np.arange(3, 23, dtype=np.int32), np.arange(30, 40, dtype=np.int32)], [15, 8])
    logprobs, _ = model(batch)
    assert len(logprobs) == 7
    assert seen[0][:2] == (1, 7)


def test_critic_starts_at_zero_and_reads_the_state_before_each_token(policy_model: str):
    critic = load_critic_model(
        policy_model, dtype="float32", attention=resolve_attention("auto", on_gpu=False), seed=3
    ).eval()
    tokens = np.arange(3, 23, dtype=np.int32)
    assert critic(pack([tokens], [5])).tolist() == [0.0] * 15
    torch.nn.init.normal_(critic.token_classifier.score.weight)
    values = critic(pack([tokens], [5]))
    tokens[-1] = 200
    assert torch.equal(critic(pack([tokens], [5])), values), "a value must not see the token it is the baseline of"
    tokens[-2] = 200
    assert critic(pack([tokens], [5]))[-1] != values[-1]
