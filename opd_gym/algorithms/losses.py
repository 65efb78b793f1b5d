"""Losses of all algorithms, as pure functions of tensors.

Every function takes per-token tensors of shape (batch, T) with a mask of the tokens that count, and returns the loss
(a scalar with gradient) and a frozen dataclass of metrics (plain floats).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch as th

from opd_gym.tokens import CategoricalTokens, GaussianTokens, TokenView

Divergence = Literal["reverse_kl", "forward_kl", "hard_ce", "jsd"]
DIVERGENCES: tuple[str, ...] = get_args(Divergence)
Metrics = TypeVar("Metrics")

# A teacher that rules a bin out gives it a log-probability of -inf, where KL(student, teacher) is infinite and has no
# gradient. At this price the student leaves the bin all the same: it is worth more than any bin that is not ruled out
MIN_LOG_PROB = -100.0
# Of a Gauss-Hermite quadrature
N_QUADRATURE_NODES = 48


@dataclass(frozen=True)
class DistillationMetrics:
    """
    :param loss: The loss that was differentiated
    :param kl: KL(student, teacher) per token: summed over the bins (exact) or at the sampled tokens (sampled)
    :param entropy: Entropy of the student per token (of a squashed Gaussian: before squashing)
    :param teacher_log_prob: Teacher's log-probability per token: of the student's mode (exact) or of the sample
        (sampled)
    :param agreement: Fraction of tokens where the modes of student and teacher are equal (continuous tokens: within one
        standard deviation of the teacher); NaN for the sampled estimator, which does not know the teacher's mode
    """

    loss: float
    kl: float
    entropy: float
    teacher_log_prob: float
    agreement: float


@dataclass(frozen=True)
class PolicyGradientMetrics:
    """
    :param loss: The loss that was differentiated
    :param clip_fraction: Fraction of tokens whose ratio left the clip range
    :param approx_kl: Estimate of KL(old policy, policy) per token, http://joschu.net/blog/kl-approx.html
    """

    loss: float
    clip_fraction: float
    approx_kl: float


def masked_mean(values: th.Tensor, mask: th.Tensor) -> th.Tensor:
    """
    Mean over the tokens that count.

    :param values: (..., batch, T)
    :param mask: 1 for tokens that count, 0 for the others, (batch, T)
    :return: One mean for each leading index, (...); 0 if no token counts
    """
    # Multiplying by the mask would let a NaN or an infinity of a masked token through
    return values.masked_fill(mask == 0, 0.0).sum(dim=(-2, -1)) / mask.sum().clamp(min=1.0)


def weighted_mean(parts: Sequence[tuple[float, Metrics]]) -> Metrics:
    """
    Metrics of a minibatch from those of its parts.

    :param parts: The share of each part, all of them adding up to 1, and its metrics
    :return: Metrics of the whole
    """
    if len(parts) == 1:
        return parts[0][1]
    first: Any = parts[0][1]
    means = {name: sum(share * getattr(m, name) for share, m in parts) for name in first.__dataclass_fields__}
    return replace(first, **means)


def smoothed_labels(n_bins: int, sigma: float, floor: float = 0.0) -> np.ndarray:
    """
    Distributions around labels, for bins of which neighbours are alike.

    :param n_bins: Number of bins
    :param sigma: Standard deviation of a Gaussian over the bins, in bins; 0: the label alone
    :param floor: Probability that is spread evenly over all bins
    :return: Probabilities of every bin for every label, float64 (n_bins, n_bins), each row adding up to 1
    """
    bins = np.arange(n_bins, dtype=np.float64)
    distance = bins[:, None] - bins
    kernel = np.exp(-0.5 * (distance / sigma) ** 2) if sigma > 0.0 else np.eye(n_bins)
    return (1.0 - floor) * kernel / kernel.sum(axis=1, keepdims=True) + floor / n_bins


# ---------------------------------------------------------------------------------------------------------------------
# On-policy distillation


def sampled_opd_loss(
    log_probs: th.Tensor,
    teacher_log_probs: th.Tensor,
    mask: th.Tensor,
    n_trajectories: float,
    entropy: th.Tensor | None = None,
) -> tuple[th.Tensor, DistillationMetrics]:
    """
    The sampled estimator of VLA-OPD (https://arxiv.org/abs/2603.26666), Eq. 6 and 7 to the letter.

    REINFORCE with the immediate token reward ``r = -(log pi_student - log pi_teacher)`` as advantage: no reward-to-go,
    no ratio, no clip, no critic, no environment reward. The loss is summed over the tokens and divided by the number
    of trajectories (``B * G`` in the paper), so losses of minibatches of one rollout add up to the loss of the rollout.

    :param log_probs: Student's log-probabilities of the sampled tokens, with gradient, (batch, T)
    :param teacher_log_probs: Teacher's log-probabilities of the same tokens, (batch, T); none counts as less than -100
    :param mask: Tokens that were executed, (batch, T)
    :param n_trajectories: Number of trajectories in the whole rollout
    :param entropy: Student's entropy per token, for the metrics, (batch, T)
    :return: Loss and metrics
    """
    teacher_log_probs = teacher_log_probs.clamp(min=MIN_LOG_PROB)
    reward = -(log_probs.detach() - teacher_log_probs)
    loss = -(log_probs * reward).masked_fill(mask == 0, 0.0).sum() / n_trajectories
    return loss, DistillationMetrics(
        loss=loss.item(),
        kl=masked_mean(-reward, mask).item(),
        entropy=math.nan if entropy is None else masked_mean(entropy.detach(), mask).item(),
        teacher_log_prob=masked_mean(teacher_log_probs, mask).item(),
        agreement=math.nan,
    )


def exact_opd_loss(
    student: TokenView, teacher: TokenView, mask: th.Tensor, divergence: Divergence = "reverse_kl"
) -> tuple[th.Tensor, DistillationMetrics]:
    """
    Divergence of student and teacher without sampling: summed over the bins, or in closed form for Gaussians.

    :param student: Student's distribution, with gradient
    :param teacher: Teacher's distribution in the same states and the same token space
    :param mask: Tokens that count, (batch, T)
    :param divergence: See :func:`token_divergence`
    :return: Mean divergence per token, and metrics
    :raises ValueError: The student rules out what the teacher does, where the divergence is infinite
    """
    divergences = token_divergence(student, teacher, divergence)
    loss = masked_mean(divergences, mask)
    if bool(th.isposinf(loss)) and isinstance(student, CategoricalTokens) and student.padding is not None:
        raise ValueError(
            f"{divergence} is infinite: the student rules out (log-probability -inf) an action that the teacher takes "
            'in that state. Use divergence="reverse_kl" or "jsd", or give student and teacher the same masks.'
        )
    with th.no_grad():
        detached, teacher = student.detach(), teacher.detach()
        kl = divergences if divergence == "reverse_kl" else token_divergence(detached, teacher, "reverse_kl")
        log_prob = teacher.log_prob(detached.mode()).clamp(min=MIN_LOG_PROB)
        # Together: for a small policy each mean of its own takes as long as a layer
        per_token = th.stack([kl, detached.entropy(), log_prob, _agreement(detached, teacher)])
        means = dict(
            zip(("kl", "entropy", "teacher_log_prob", "agreement"), masked_mean(per_token, mask).tolist(), strict=True)
        )
        metrics = DistillationMetrics(loss=loss.item(), **means)
    return loss, metrics


def token_divergence(student: TokenView, teacher: TokenView, divergence: Divergence = "reverse_kl") -> th.Tensor:
    """
    Divergence of each token.

    - ``reverse_kl``: KL(student, teacher), the paper's objective: mode-seeking.
    - ``forward_kl``: KL(teacher, student): mass-covering.
    - ``hard_ce``: cross-entropy on the teacher's mode (its mean, for Gaussians).
    - ``jsd``: Jensen-Shannon divergence with equal weights; for Gaussians by Gauss-Hermite quadrature, since it has no
      closed form.

    In ``reverse_kl`` no log-probability of the teacher counts as less than -100: what the teacher rules out costs the
    student 100 nats times its probability there, instead of infinitely much. ``forward_kl`` and ``hard_ce`` are
    infinite where the student rules out what the teacher does; ``jsd`` is always finite.

    A tanh changes none of KL and JSD, so two squashed Gaussians are compared before squashing.

    :param student: Student's distribution
    :param teacher: Teacher's distribution of the same kind
    :param divergence: One of the above
    :return: (batch, T)
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"Expected divergence to be one of {DIVERGENCES}, got {divergence!r}.")
    if isinstance(student, CategoricalTokens) and isinstance(teacher, CategoricalTokens):
        return _categorical_divergence(student, teacher, divergence)
    if isinstance(student, GaussianTokens) and isinstance(teacher, GaussianTokens):
        if student.squashed != teacher.squashed:
            raise ValueError(
                "One of student and teacher squashes its actions by a tanh and the other does not: their Gaussians "
                "cannot be compared. Convert the teacher first (make_teacher does)."
            )
        return _gaussian_divergence(student, teacher, divergence)
    raise ValueError(
        "Expected student and teacher to have tokens of one kind, "
        f"got {type(student).__name__} and {type(teacher).__name__}."
    )


def _categorical_divergence(
    student: CategoricalTokens, teacher: CategoricalTokens, divergence: Divergence
) -> th.Tensor:
    log_p, log_q = student.log_probs, teacher.log_probs
    if divergence == "hard_ce":
        return -log_p.gather(-1, log_q.argmax(dim=-1, keepdim=True)).squeeze(-1)
    p = log_p.exp()
    log_q = log_q.clamp(min=MIN_LOG_PROB)
    # Not of the clamped values: a bin that the teacher rules out has probability 0
    q = teacher.log_probs.exp() if divergence != "reverse_kl" else None
    ruled_out = student.padding
    if ruled_out is not None:
        # A term of probability 0 is 0; its -inf must not meet that 0, neither here nor in the backward pass. Only
        # KL(teacher, student) is infinite where the teacher has mass and the student has none.
        if divergence == "forward_kl" and q is not None:
            ruled_out = ruled_out & (q == 0.0)
        log_p = log_p.masked_fill(ruled_out, MIN_LOG_PROB)
    if q is None:
        return _sum_over_bins(p, log_p - log_q)
    if divergence == "forward_kl":
        return _sum_over_bins(q, log_q - log_p)
    mixture = th.logaddexp(log_p, log_q) - math.log(2.0)
    return 0.5 * (_sum_over_bins(p, log_p - mixture) + _sum_over_bins(q, log_q - mixture))


def _sum_over_bins(probabilities: th.Tensor, values: th.Tensor) -> th.Tensor:
    return th.einsum("btv,btv->bt", probabilities, values)


def _gaussian_divergence(student: GaussianTokens, teacher: GaussianTokens, divergence: Divergence) -> th.Tensor:
    if divergence == "reverse_kl":
        return _gaussian_kl(student, teacher)
    if divergence == "forward_kl":
        return _gaussian_kl(teacher, student)
    if divergence == "hard_ce":
        # Of two squashed Gaussians before squashing: the tanh only adds a term without the student's parameters
        return -GaussianTokens(student.mean, student.log_std).log_prob(teacher.mean)
    return _gaussian_jsd(student, teacher)


def _gaussian_kl(p: GaussianTokens, q: GaussianTokens) -> th.Tensor:
    scaled = (2.0 * (p.log_std - q.log_std)).exp() + ((p.mean - q.mean) / q.log_std.exp()) ** 2
    return q.log_std - p.log_std + 0.5 * (scaled - 1.0)


def _gaussian_jsd(p: GaussianTokens, q: GaussianTokens) -> th.Tensor:
    """
    Jensen-Shannon divergence by quadrature, (batch, T). One may be much narrower than the other, so the line is cut
    into intervals of its standard deviations and of the other's, in each of which eight points are exact enough.
    """
    with th.no_grad():
        edges = p.mean.new_tensor([0.0, 0.75, 1.5, 2.25, 3.0, 4.0, 5.25, 7.0])
        edges = th.cat([-edges.flip(0), edges[1:]])
        cuts = th.cat([d.mean.unsqueeze(-1) + d.log_std.exp().unsqueeze(-1) * edges for d in (p, q)], dim=-1)
        cuts = cuts.sort(dim=-1).values
        nodes, weights = (p.mean.new_tensor(array) for array in np.polynomial.legendre.leggauss(8))
        half, middle = cuts.diff(dim=-1) / 2, (cuts[..., 1:] + cuts[..., :-1]) / 2
        x = (middle.unsqueeze(-1) + half.unsqueeze(-1) * nodes).flatten(-2)
        dx = (half.unsqueeze(-1) * weights).flatten(-2)
    log_p, log_q = (
        -0.5 * ((x - d.mean.unsqueeze(-1)) / d.log_std.exp().unsqueeze(-1)) ** 2
        - d.log_std.unsqueeze(-1)
        - 0.5 * math.log(2.0 * math.pi)
        for d in (p, q)
    )
    mixture = th.logaddexp(log_p, log_q) - math.log(2.0)
    return 0.5 * ((log_p.exp() * (log_p - mixture) + log_q.exp() * (log_q - mixture)) * dx).sum(dim=-1)


def hermite_nodes(like: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Gauss-Hermite quadrature of an expectation under a standard normal.

    :param like: Tensor whose dtype and device are used
    :return: Nodes and weights (summing to 1)
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(N_QUADRATURE_NODES)
    return like.new_tensor(nodes), like.new_tensor(weights / weights.sum())


def _agreement(student: TokenView, teacher: TokenView) -> th.Tensor:
    if isinstance(student, GaussianTokens) and isinstance(teacher, GaussianTokens):
        return ((student.mean - teacher.mean).abs() <= teacher.log_std.exp()).float()
    return (student.mode() == teacher.mode()).float()


# ---------------------------------------------------------------------------------------------------------------------
# Policy gradients


def clipped_surrogate(
    log_probs: th.Tensor,
    old_log_probs: th.Tensor,
    advantages: th.Tensor,
    weights: th.Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
) -> tuple[th.Tensor, PolicyGradientMetrics]:
    """
    Clipped surrogate of PPO (https://arxiv.org/abs/1707.06347), with one ratio per token.

    :param log_probs: Log-probabilities of the taken tokens, with gradient, (batch, T)
    :param old_log_probs: The same when the tokens were sampled, (batch, T)
    :param advantages: One per token, or one per row to be shared by its tokens, (batch, T) or (batch, 1)
    :param weights: Weight of each token in the loss, 0 where it does not count, (batch, T); a mask divided by its sum
        gives the mean over tokens, :func:`trajectory_weights` the mean over trajectories
    :param clip_range: The ratio is clipped from below at ``1 - clip_range``
    :param clip_range_high: The ratio is clipped from above at ``1 + clip_range_high`` ("clip-higher",
        https://arxiv.org/abs/2503.14476); None: ``clip_range``
    :return: Loss and metrics
    """
    clip_range_high = clip_range if clip_range_high is None else clip_range_high
    # Masked first: the ratio of a token that does not count may overflow, and inf * 0 is NaN
    log_ratio = (log_probs - old_log_probs).masked_fill(weights == 0, 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range_high)
    loss = -(th.min(advantages * ratio, advantages * clipped) * weights).sum()
    with th.no_grad():
        mask = (weights != 0).float()
        metrics = PolicyGradientMetrics(
            loss=loss.item(),
            clip_fraction=masked_mean((ratio != clipped).float(), mask).item(),
            approx_kl=masked_mean(ratio - 1.0 - log_ratio, mask).item(),
        )
    return loss, metrics


def trajectory_weights(mask: th.Tensor, trajectory_ids: th.Tensor) -> th.Tensor:
    """
    Weights that turn a sum over tokens into the mean over trajectories of each trajectory's mean over its tokens.

    :param mask: Tokens that were executed, (batch, T)
    :param trajectory_ids: Trajectory of each row, any integers, (batch,)
    :return: (batch, T), summing to 1 over the batch
    """
    _, index = th.unique(trajectory_ids, return_inverse=True)
    n_tokens = th.zeros(int(index.max()) + 1, dtype=mask.dtype, device=mask.device).index_add_(
        0, index, mask.sum(dim=1)
    )
    n_trajectories = (n_tokens > 0).sum().clamp(min=1)
    return mask / (n_tokens[index].clamp(min=1.0) * n_trajectories).unsqueeze(1)


def group_advantages(outcomes: np.ndarray, group_ids: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """
    Advantage of each trajectory against its group: ``(R - mean) / (std + eps)``, with the sample standard deviation.

    :param outcomes: Outcome of each trajectory, (n,)
    :param group_ids: Group of each trajectory, (n,)
    :param eps: Keeps a group of equal outcomes at 0
    :return: (n,); 0 in a group of one
    """
    advantages = np.zeros(len(outcomes), dtype=np.float32)
    for group in np.unique(group_ids):
        members = group_ids == group
        if members.sum() > 1:
            r = outcomes[members].astype(np.float64)
            advantages[members] = (r - r.mean()) / (r.std(ddof=1) + eps)
    return advantages
