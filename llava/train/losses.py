"""DPO as pure functions of tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class DPOLoss(NamedTuple):
    """Per pair, each of shape (B,); the rewards carry no gradient."""

    losses: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor


def dpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: float,
) -> DPOLoss:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, equation 7).

    All inputs are log-probabilities of whole answers, shape (B,).
    ``loss = -log sigmoid(beta * ((pi_c - pi_r) - (ref_c - ref_r)))``; an answer's reward is
    ``beta * (pi - ref)`` (equation 5, up to a constant of the prompt).
    """
    policy_margin = policy_chosen_logps - policy_rejected_logps
    reference_margin = reference_chosen_logps - reference_rejected_logps
    return DPOLoss(
        -F.logsigmoid(beta * (policy_margin - reference_margin)),
        beta * (policy_chosen_logps - reference_chosen_logps).detach(),
        beta * (policy_rejected_logps - reference_rejected_logps).detach(),
    )
