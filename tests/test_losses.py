import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch as th
from scipy.integrate import trapezoid
from scipy.stats import norm

from opd_gym.algorithms.losses import (
    clipped_surrogate,
    exact_opd_loss,
    group_advantages,
    masked_mean,
    sampled_opd_loss,
    token_divergence,
    trajectory_weights,
)
from opd_gym.tokens import CategoricalTokens, GaussianTokens

P = [0.5, 0.3, 0.2]
Q = [0.2, 0.2, 0.6]
M = [0.35, 0.25, 0.4]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def tokens(*rows):
    return CategoricalTokens(th.log(th.tensor([rows], dtype=th.float64)))


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        ("reverse_kl", kl(P, Q)),
        ("forward_kl", kl(Q, P)),
        ("hard_ce", -math.log(0.2)),
        ("jsd", 0.5 * kl(P, M) + 0.5 * kl(Q, M)),
    ],
)
def test_categorical_divergences_by_hand(divergence, expected):
    assert token_divergence(tokens(P), tokens(Q), divergence).item() == pytest.approx(expected, abs=1e-9)


TRL = json.loads((Path(__file__).parent / "golden" / "trl" / "generalized_jsd_loss.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", TRL["cases"], ids=lambda case: f"{case['divergence']}-{case['temperature']}")
def test_losses_and_gradients_are_those_of_trl(case):
    """``GKDTrainer.generalized_jsd_loss``, at its ends and in the middle: tests/golden/trl/make_golden.py."""
    logits, teacher_logits = (th.tensor(TRL[f"{who}_logits"], dtype=th.float64) for who in ("student", "teacher"))
    logits.requires_grad_()
    student, teacher = (
        CategoricalTokens(th.log_softmax(x, dim=-1)).temper(case["temperature"]) for x in (logits, teacher_logits)
    )
    mask = th.tensor(TRL["mask"], dtype=th.float64)
    assert 0 < mask.sum() < mask.numel()
    loss, _ = exact_opd_loss(student, teacher, mask, case["divergence"])
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-9)
    np.testing.assert_allclose(logits.grad, case["gradient"], rtol=0, atol=1e-9)


def test_the_golden_losses_hold_both_ends():
    found = {(case["divergence"], case["beta"]) for case in TRL["cases"]}
    assert found == {("forward_kl", 0.0), ("jsd", 0.5), ("reverse_kl", 1.0)} and len(TRL["cases"]) == 6


def gaussian(mean, std, squashed=False):
    return GaussianTokens(th.tensor([[mean]]).double(), th.tensor([[math.log(std)]]).double(), squashed)


@pytest.mark.parametrize("squashed", [False, True])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "hard_ce", "jsd"])
def test_gaussian_divergences_against_numerical_integrals(divergence, squashed):
    student, teacher = gaussian(0.3, 0.8, squashed), gaussian(-0.5, 1.3, squashed)
    x = th.linspace(-12, 12, 200_001, dtype=th.float64).unsqueeze(1)
    log_p, log_q = (GaussianTokens(d.mean, d.log_std).log_prob(x).squeeze(1) for d in (student, teacher))
    log_m = th.logaddexp(log_p, log_q) - math.log(2)

    def integral(f):
        return th.trapezoid(f, x.squeeze(1)).item()

    expected = {
        "reverse_kl": integral(log_p.exp() * (log_p - log_q)),
        "forward_kl": integral(log_q.exp() * (log_q - log_p)),
        "hard_ce": 0.5 * (0.8 / 0.8) ** 2 + math.log(0.8) + 0.5 * math.log(2 * math.pi),
        "jsd": 0.5 * integral(log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)),
    }[divergence]
    assert token_divergence(student, teacher, divergence).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("std", [1.0, 0.2, 0.1, 0.05, 0.01, 1e-3])
@pytest.mark.parametrize("distance", [0.0, 0.3, 3.0, 30.0])
def test_jsd_of_gaussians_of_any_width(std, distance):
    """A teacher that is made of labels is much narrower than a new student."""
    mean = th.zeros(1, 1, dtype=th.float64, requires_grad=True)
    student = GaussianTokens(mean, th.zeros(1, 1, dtype=th.float64))
    teacher = GaussianTokens(th.full((1, 1), distance).double(), th.full((1, 1), math.log(std)).double())
    value = token_divergence(student, teacher, "jsd")
    (slope,) = th.autograd.grad(value.sum(), mean)
    # Ever finer steps towards the middle of the narrow one
    offsets = np.geomspace(1e-6, 60.0, 200_001)
    x = np.concatenate([distance - offsets[::-1], distance + offsets])
    log_p, log_q = norm.logpdf(x), norm.logpdf(x, distance, std)
    log_m = np.logaddexp(log_p, log_q) - math.log(2.0)
    p, q = np.exp(log_p), np.exp(log_q)
    assert value.item() == pytest.approx(trapezoid(0.5 * (p * (log_p - log_m) + q * (log_q - log_m)), x), abs=1e-6)
    # d JSD / d mean = E_p[(x - mean) log(p / m)] / 2
    assert slope.item() == pytest.approx(trapezoid(0.5 * p * x * (log_p - log_m), x), abs=1e-6)
    assert token_divergence(teacher, student, "jsd").item() == pytest.approx(value.item(), abs=1e-9)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "hard_ce", "jsd"])
def test_gradients_by_finite_differences(divergence):
    th.manual_seed(0)
    logits = th.randn(2, 3, 4, dtype=th.float64, requires_grad=True)
    padded = th.zeros(2, 3, 4, dtype=th.bool)
    padded[:, 1, 2:] = True
    teacher = CategoricalTokens(
        th.log_softmax(th.randn(2, 3, 4, dtype=th.float64).masked_fill(padded, -math.inf), dim=-1)
    )

    def categorical(x):
        student = CategoricalTokens(th.log_softmax(x.masked_fill(padded, -math.inf), dim=-1))
        return token_divergence(student, teacher, divergence)

    assert th.autograd.gradcheck(categorical, (logits,))

    mean, log_std = (th.randn(2, 3, dtype=th.float64, requires_grad=True) for _ in range(2))
    other = GaussianTokens(th.randn(2, 3, dtype=th.float64), th.zeros(2, 3, dtype=th.float64))
    assert th.autograd.gradcheck(
        lambda m, s: token_divergence(GaussianTokens(m, s), other, divergence), (mean, log_std)
    )


def test_a_teacher_that_rules_bins_out_gives_finite_losses():
    teacher = CategoricalTokens(th.tensor([[[0.0, -math.inf, -math.inf]]]))
    logits = th.zeros(1, 1, 3, requires_grad=True)
    for divergence in ("reverse_kl", "forward_kl", "hard_ce", "jsd"):
        loss, _ = exact_opd_loss(CategoricalTokens(th.log_softmax(logits, -1)), teacher, th.ones(1, 1), divergence)
        loss.backward()
        assert math.isfinite(loss.item()) and bool(th.isfinite(logits.grad).all())


def test_what_a_teacher_rules_out_costs_a_hundred_nats_and_is_left():
    teacher = CategoricalTokens(th.tensor([[[math.log(0.5), math.log(0.5), -math.inf]]]))
    logits = th.tensor([[[0.0, 0.0, 3.0]]], requires_grad=True)
    student = CategoricalTokens(th.log_softmax(logits, -1))
    p = student.log_probs.detach().exp().flatten()
    loss, metrics = exact_opd_loss(student, teacher, th.ones(1, 1))
    by_hand = sum(p * p.log()) - (p[0] + p[1]) * math.log(0.5) + 100.0 * p[2]
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5) and metrics.teacher_log_prob == -100.0
    loss.backward()
    assert logits.grad[0, 0, 2] > 0 > logits.grad[0, 0, 0]  # descent takes the logit down, and the others up
    log_probs = th.tensor([[-1.0, -2.0]], requires_grad=True)
    loss, metrics = sampled_opd_loss(log_probs, th.tensor([[-0.5, -math.inf]]), th.ones(1, 2), 1)
    loss.backward()
    assert log_probs.grad.tolist() == [[-0.5, 98.0]]
    assert metrics.kl == pytest.approx((-0.5 + 98.0) / 2) and metrics.teacher_log_prob == pytest.approx(-100.5 / 2)


def test_exact_loss_masks_tokens_and_reports():
    student, teacher = tokens(P, P), tokens(Q, P)
    loss, metrics = exact_opd_loss(student, teacher, th.tensor([[1.0, 0.0]], dtype=th.float64))
    assert loss.item() == pytest.approx(kl(P, Q)) == pytest.approx(metrics.kl)
    assert metrics.agreement == 0.0  # modes 0 and 2
    assert metrics.entropy == pytest.approx(-sum(p * math.log(p) for p in P))
    assert metrics.teacher_log_prob == pytest.approx(math.log(0.2))  # of the student's mode
    _, both = exact_opd_loss(student, teacher, th.ones(1, 2), "hard_ce")
    assert both.kl == pytest.approx(kl(P, Q) / 2) and both.agreement == 0.5


def test_refusals():
    with pytest.raises(ValueError, match="divergence"):
        token_divergence(tokens(P), tokens(Q), "wasserstein")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one kind"):
        token_divergence(tokens(P), gaussian(0.0, 1.0))
    with pytest.raises(ValueError, match="tanh"):
        token_divergence(gaussian(0.0, 1.0), gaussian(0.0, 1.0, True))


def test_sampled_loss_is_equations_6_and_7():
    log_probs = th.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    teacher = th.tensor([[-0.5, -4.0], [-0.5, 7.0]])
    mask = th.tensor([[1.0, 1.0], [1.0, 0.0]])
    loss, metrics = sampled_opd_loss(log_probs, teacher, mask, n_trajectories=2)
    loss.backward()
    # r = -(log pi_student - log pi_teacher) = 0.5, -2, 0; d loss / d log pi = -r / (B G), and nothing through r
    assert th.allclose(log_probs.grad, th.tensor([[-0.25, 1.0], [0.0, 0.0]]))
    assert loss.item() == pytest.approx(-(-1.0 * 0.5 + -2.0 * -2.0 + 0.0) / 2)
    assert metrics.kl == pytest.approx((-0.5 + 2.0 + 0.0) / 3)
    assert math.isnan(metrics.agreement)


def test_expected_gradient_of_the_sampled_loss_is_that_of_the_exact_reverse_kl():
    th.manual_seed(1)
    logits = th.randn(1, 1, 5, dtype=th.float64, requires_grad=True)
    teacher = CategoricalTokens(th.log_softmax(th.randn(1, 1, 5, dtype=th.float64), dim=-1))
    student = CategoricalTokens(th.log_softmax(logits, dim=-1))
    loss, _ = exact_opd_loss(student, teacher, th.ones(1, 1, dtype=th.float64))
    (exact,) = th.autograd.grad(loss, logits, retain_graph=True)
    expected = th.zeros_like(exact)
    for action in range(5):
        token = th.tensor([[action]])
        sampled, _ = sampled_opd_loss(student.log_prob(token), teacher.log_prob(token), th.ones(1, 1), 1)
        (gradient,) = th.autograd.grad(sampled, logits, retain_graph=True)
        expected += student.log_prob(token).exp().detach() * gradient
    assert th.allclose(expected, exact, atol=1e-9)


def test_masked_mean_lets_no_nan_through():
    values = th.tensor([[1.0, math.nan]])
    assert masked_mean(values, th.tensor([[1.0, 0.0]])).item() == 1.0
    assert masked_mean(values, th.zeros(1, 2)).item() == 0.0


def test_clipped_surrogate_by_hand():
    ratio = th.tensor([[1.5, 1.1], [0.5, 0.5]])
    log_probs = ratio.log().requires_grad_()
    advantages = th.tensor([[1.0], [-2.0]])
    mask = th.tensor([[1.0, 1.0], [1.0, 0.0]])
    loss, metrics = clipped_surrogate(log_probs, th.zeros(2, 2), advantages, mask / mask.sum(), 0.2, 0.28)
    # min(1.5, 1.28), min(1.1, 1.1), min(-2 * 0.5, -2 * 0.8)
    assert loss.item() == pytest.approx(-(1.28 + 1.1 - 1.6) / 3)
    assert metrics.clip_fraction == pytest.approx(2 / 3)
    loss.backward()
    assert th.allclose(log_probs.grad, th.tensor([[0.0, -1.1 / 3], [0.0, 0.0]]))


LOW, HIGH = 0.2, 0.28


@pytest.mark.parametrize(
    ("ratio", "advantage", "counts"),
    [
        # Inside: the ratio itself, whatever the sign
        (1.0, 2.0, True),
        (1.0, -2.0, True),
        (0.81, 2.0, True),
        (0.81, -2.0, True),
        (1.27, 2.0, True),
        (1.27, -2.0, True),
        # Outside where the advantage has led: no more of it
        (1.29, 2.0, False),
        (5.0, 0.5, False),
        (0.79, -2.0, False),
        (0.1, -0.5, False),
        # Outside on the other side: the way back is open
        (0.79, 2.0, True),
        (0.1, 0.5, True),
        (1.29, -2.0, True),
        (5.0, -0.5, True),
    ],
)
def test_gradient_of_one_ratio(ratio, advantage, counts):
    """d/dx of -w min(A r, A clip(r)) with r = exp(x - old) is -w A r, or 0 where the clipped one is the smaller."""
    old = th.tensor([[-0.3, -1.7]], dtype=th.float64)
    log_probs = (old + th.tensor([[math.log(ratio), 0.0]], dtype=th.float64)).requires_grad_()
    weights = th.tensor([[0.75, 0.25]], dtype=th.float64)
    loss, metrics = clipped_surrogate(log_probs, old, th.tensor([[advantage]]).double(), weights, LOW, HIGH)
    loss.backward()
    expected = [-0.75 * advantage * ratio if counts else 0.0, -0.25 * advantage]
    assert log_probs.grad[0].tolist() == pytest.approx(expected, abs=1e-9)
    assert metrics.clip_fraction == (0.5 if not 1 - LOW < ratio < 1 + HIGH else 0.0)


def test_clipped_surrogate_survives_overflow_of_masked_tokens():
    log_probs = th.tensor([[1000.0, 0.0]], requires_grad=True)
    loss, _ = clipped_surrogate(log_probs, th.zeros(1, 2), th.ones(1, 1), th.tensor([[0.0, 1.0]]), 0.2)
    loss.backward()
    assert math.isfinite(loss.item()) and bool(th.isfinite(log_probs.grad).all())


def test_trajectory_weights():
    mask = th.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    weights = trajectory_weights(mask, th.tensor([7, 7, 9]))
    # Trajectory 7 has three tokens and 9 has two; each trajectory weighs one half
    assert th.allclose(weights, th.tensor([[1 / 6, 1 / 6], [1 / 6, 0.0], [0.25, 0.25]]))


def test_group_advantages():
    outcomes = np.array([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 5.0])
    groups = np.array([0, 0, 0, 0, 1, 1, 2])
    advantages = group_advantages(outcomes, groups)
    assert advantages[:4] == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-4)
    assert advantages[4:] == pytest.approx([0.0, 0.0, 0.0])


@pytest.mark.parametrize("flipped", [False, True])
def test_each_state_may_rule_out_other_bins(flipped):
    x = th.tensor([[[0.5, 0.5, 0.0]], [[0.0, 0.5, 0.5]]], dtype=th.float64)
    y = th.tensor([[[0.2, 0.8, 0.0]], [[0.4, 0.3, 0.3]]], dtype=th.float64)
    x, y = (x.flip(0), y.flip(0)) if flipped else (x, y)
    logits = x.log().requires_grad_()
    student, teacher = CategoricalTokens(th.log_softmax(logits, dim=-1)), CategoricalTokens(y.log())
    m = (x + y) / 2
    expected = {
        "reverse_kl": th.special.xlogy(x, x / y.clamp(min=1e-9)).sum(-1),
        "jsd": 0.5 * (th.special.xlogy(x, x / m.clamp(min=1e-9)) + th.special.xlogy(y, y / m.clamp(min=1e-9))).sum(-1),
    }
    for divergence, value in expected.items():
        got = token_divergence(student, teacher, divergence)
        assert th.allclose(got, value)
        assert th.isfinite(th.autograd.grad(got.sum(), logits, retain_graph=True)[0]).all()
    assert th.allclose(student.entropy(), th.full((2, 1), math.log(2.0), dtype=th.float64))
    forward = token_divergence(student, teacher, "forward_kl").flatten()
    assert forward.isposinf().tolist() == ([True, False] if flipped else [False, True])
    for divergence in ("forward_kl", "hard_ce"):
        with pytest.raises(ValueError, match="the student rules out"):
            exact_opd_loss(student, teacher, th.ones(2, 1), divergence)
