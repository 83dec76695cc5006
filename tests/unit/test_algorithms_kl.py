"""KL estimators against exact integrals, controllers against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

from rlhf_ray.algorithms.kl import KLController, KLEstimator, kl_estimate
from rlhf_ray.config.algorithm import KLSettings


def adaptive(horizon: int) -> KLController:
    return KLController(KLSettings(controller="adaptive", coefficient=0.1, target=6.0, horizon=horizon))


@pytest.mark.parametrize(
    ("mean", "estimator", "bias", "bias_tolerance", "std", "std_tolerance"),
    [
        (0.1, "k1", 0, 1e-9, 20, 0.01),
        (0.1, "k2", 0.002, 0.001, 1.42, 0.005),
        (0.1, "k3", 0, 1e-9, 1.42, 0.005),
        (1.0, "k1", 0, 1e-9, 2.00, 0.005),
        (1.0, "k2", 0.25, 1e-9, 1.73, 0.005),
        (1.0, "k3", 0, 1e-9, 1.70, 0.01),
    ],
)
def test_bias_and_deviation_of_the_estimators(
    mean: float, estimator: KLEstimator, bias: float, bias_tolerance: float, std: float, std_tolerance: float
) -> None:
    """Schulman's table: q = N(0, 1) samples, p = N(mean, 1) is the reference, figures relative to the true KL."""
    # Gauss-Hermite quadrature is exact up to rounding for these integrands, unlike sampling.
    nodes, quadrature_weights = np.polynomial.hermite_e.hermegauss(80)
    x = torch.tensor(nodes, dtype=torch.float64)
    weights = torch.tensor(quadrature_weights / math.sqrt(2 * math.pi), dtype=torch.float64)
    true = 0.5 * mean**2
    estimate = kl_estimate(-0.5 * x**2, -0.5 * (x - mean) ** 2, estimator)
    expectation = float((weights * estimate).sum())
    deviation = math.sqrt(float((weights * (estimate - expectation) ** 2).sum()))
    assert (expectation - true) / true == pytest.approx(bias, abs=bias_tolerance)
    assert deviation / true == pytest.approx(std, abs=std_tolerance)


def test_expected_gradients_on_the_policys_own_samples() -> None:
    """What the docstring says: k1 has none, k2 that of KL(policy || reference), k3 that of KL(reference || policy)."""
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.tensor([-0.2, 0.5, 0.1], dtype=torch.float64), 0)
    policy = torch.log_softmax(logits, 0)

    def gradient(objective: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(objective, logits, retain_graph=True)[0]

    def expected(estimator: KLEstimator) -> torch.Tensor:
        return gradient((policy.exp().detach() * kl_estimate(policy, reference, estimator)).sum())

    forward = gradient((policy.exp() * (policy - reference)).sum())
    backward = gradient((reference.exp() * (reference - policy)).sum())
    torch.testing.assert_close(expected("k1"), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(expected("k2"), forward)
    torch.testing.assert_close(expected("k3"), backward)


def test_k3_keeps_its_digits_for_small_differences() -> None:
    difference = torch.tensor([1e-3], dtype=torch.float32)
    exact = math.expm1(-1e-3) + 1e-3
    assert float(kl_estimate(difference, torch.zeros(1), "k3")) == pytest.approx(exact, rel=1e-3)


def test_k3_is_finite_however_far_the_policy_is_from_the_reference() -> None:
    distances = torch.tensor([-1e4, -100.0, -19.0, 100.0, 1e4], requires_grad=True)
    estimate = kl_estimate(distances, torch.zeros(5), "k3")
    [gradient] = torch.autograd.grad(estimate.sum(), distances)
    assert estimate.isfinite().all()
    assert gradient.isfinite().all()
    assert estimate[2].item() == pytest.approx(math.expm1(19) - 19)
    assert estimate[3:].tolist() == [99.0, 9999.0]
    assert gradient[3:].tolist() == [1.0, 1.0]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]


def test_adaptive_controller_against_hand_computed_numbers() -> None:
    controller = KLController(KLSettings(controller="adaptive", coefficient=0.1, target=6.0, horizon=1000))
    controller.update(6.6, 100)  # error 0.1
    assert controller.coefficient == pytest.approx(0.1 * 1.01)
    controller.update(60.0, 100)  # error 9, clipped to 0.2
    assert controller.coefficient == pytest.approx(0.1 * 1.01 * 1.02)
    controller.update(-5.0, 500)  # clipped to -0.2
    assert controller.coefficient == pytest.approx(0.1 * 1.01 * 1.02 * 0.9)
    controller.update(6.0, 500)  # on target
    assert controller.coefficient == pytest.approx(0.1 * 1.01 * 1.02 * 0.9)


def test_adaptive_controller_never_changes_sign() -> None:
    controller = adaptive(1)
    controller.update(0.0, 4096)
    assert controller.coefficient == pytest.approx(0.08)


def test_adaptive_controller_refuses_a_kl_that_is_no_number() -> None:
    with pytest.raises(ValueError, match="nan"):
        adaptive(1000).update(math.nan, 10)


def test_a_resumed_adaptive_controller_goes_on_where_it_was() -> None:
    left_alone, stopped = adaptive(100), adaptive(100)
    for controller in (left_alone, stopped):
        controller.update(9.0, 30)
    resumed = adaptive(100)
    resumed.load_state_dict(stopped.state_dict())
    for controller in (left_alone, resumed):
        controller.update(2.0, 30)
    assert resumed.coefficient == left_alone.coefficient != 0.1


def test_fixed_controller_stays_with_its_settings() -> None:
    controller = KLController(KLSettings(coefficient=0.05))
    controller.update(100.0, 100)
    controller.load_state_dict({"coefficient": 0.3})
    assert controller.coefficient == 0.05
