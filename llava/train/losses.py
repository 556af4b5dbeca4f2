"""Losses over preference pairs as pure functions of tensors, under TRL's names and with its numbers.

For a pair's answers ``c`` (chosen) and ``r`` (rejected), ``h = (pi_c - ref_c) - (pi_r - ref_r)`` is how much more the
policy prefers the chosen one than the reference does: ``pi`` and ``ref`` are log-probabilities of whole answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Pairs(NamedTuple):
    """What the losses look at; every tensor is of shape (B,), log-probabilities are of whole answers."""

    policy_chosen: torch.Tensor
    policy_rejected: torch.Tensor
    reference_chosen: torch.Tensor
    reference_rejected: torch.Tensor
    chosen_counts: torch.Tensor  # labels of the answer
    rejected_counts: torch.Tensor
    beta: float
    label_smoothing: float = 0.0

    @property
    def chosen_ratios(self) -> torch.Tensor:
        """``pi_c - ref_c``."""
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_ratios(self) -> torch.Tensor:
        """``pi_r - ref_r``."""
        return self.policy_rejected - self.reference_rejected

    @property
    def margins(self) -> torch.Tensor:
        """``h``, in HA-DPO's order: in float32 another one rounds otherwise, which its recorded losses show."""
        return (self.policy_chosen - self.policy_rejected) - (self.reference_chosen - self.reference_rejected)

    @property
    def margins_per_token(self) -> torch.Tensor:
        """``h`` of either answer's mean over its tokens."""
        chosen = self.chosen_ratios / self.chosen_counts.clamp(min=1)
        return chosen - self.rejected_ratios / self.rejected_counts.clamp(min=1)


def sigmoid(pairs: Pairs) -> torch.Tensor:
    """DPO (Rafailov et al. 2023, arXiv:2305.18290, equation 7): ``-log sigmoid(beta h)``, (B,).

    With label smoothing e, conservative DPO (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf), where a label is wrong
    with probability e: ``-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)``. (TRL ignores e here.)
    """
    wrong = pairs.label_smoothing
    logits = pairs.beta * pairs.margins
    return -(1 - wrong) * F.logsigmoid(logits) - wrong * F.logsigmoid(-logits)


def robust(pairs: Pairs) -> torch.Tensor:
    """Robust DPO (Chowdhury et al. 2024, arXiv:2403.00409), unbiased where labels are wrong with probability e, (B,).

    ``(-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2 e)``, e the label smoothing in [0, 0.5).
    """
    wrong = pairs.label_smoothing
    logits = pairs.beta * pairs.margins
    return (-(1 - wrong) * F.logsigmoid(logits) + wrong * F.logsigmoid(-logits)) / (1 - 2 * wrong)


def hinge(pairs: Pairs) -> torch.Tensor:
    """SLiC's loss (arXiv:2305.10425) of DPO's margin, as in RSO (arXiv:2309.06657): ``max(0, 1 - beta h)``, (B,)."""
    return F.relu(1 - pairs.beta * pairs.margins)


def ipo(pairs: Pairs) -> torch.Tensor:
    """IPO (Azar et al. 2023, arXiv:2310.12036, equation 17): ``(h' - 1 / (2 beta))^2``, (B,).

    ``h'`` is ``h`` of means over tokens, as the authors and TRL compute it; beta is the paper's tau.
    """
    return (pairs.margins_per_token - 1 / (2 * pairs.beta)) ** 2


def sigmoid_norm(pairs: Pairs) -> torch.Tensor:
    """Length-normalised DPO (as in Tulu 3, arXiv:2411.15124): ``-log sigmoid(beta h')``, ``h'`` as in ``ipo``, (B,)."""
    return -F.logsigmoid(pairs.beta * pairs.margins_per_token)


def sft(pairs: Pairs) -> torch.Tensor:
    """Negative log-likelihood of the chosen answers, ``-pi_c``, (B,); its mean is over the batch's chosen tokens.

    Several ranks average their batches' means.
    """
    return -pairs.policy_chosen


LOSSES: dict[str, Callable[[Pairs], torch.Tensor]] = {
    loss.__name__: loss for loss in (sigmoid, hinge, ipo, robust, sigmoid_norm, sft)
}
SMOOTHED = ("sigmoid", "robust")  # those that look at the label smoothing


class PreferenceLoss(NamedTuple):
    """What a step needs of its pairs; all but the loss carry no gradient."""

    loss: torch.Tensor  # ()
    terms: dict[str, tuple[torch.Tensor, torch.Tensor]]  # (B,) losses, (B,) what they are divided by, both to be summed
    chosen_rewards: torch.Tensor  # (B,)
    rejected_rewards: torch.Tensor  # (B,)


def preference_loss(
    pairs: Pairs, types: Sequence[str] = ("sigmoid",), weights: Sequence[float] | None = None
) -> PreferenceLoss:
    """The weighted sum of the means of ``types`` (names of ``LOSSES``), every weight 1 where none are given.

    An answer's reward is ``beta * (pi - ref)`` (arXiv:2305.18290, equation 5, up to a constant of the prompt).
    """
    loss, terms = pairs.policy_chosen.new_zeros(()), {}
    for name, weight in zip(types, weights or [1.0] * len(types), strict=True):
        losses = LOSSES[name](pairs)
        over = pairs.chosen_counts if name == "sft" else torch.ones_like(pairs.chosen_counts)
        terms[name] = (losses.detach(), over)
        loss = loss + weight * losses.sum() / over.sum().clamp(min=1)
    return PreferenceLoss(
        loss,
        terms,
        pairs.beta * pairs.chosen_ratios.detach(),
        pairs.beta * pairs.rejected_ratios.detach(),
    )
