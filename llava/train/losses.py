"""DPO as pure functions of tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from llava.constants import IGNORE_INDEX


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


def row_logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the labelled tokens' log-probabilities of every row, (B,), in float32.

    ``logits`` (n_labels, V) are those of the positions before each label, in row-major order of
    ``labels[:, 1:] != IGNORE_INDEX``; ``labels`` is (B, L).
    """
    labelled = labels[:, 1:] != IGNORE_INDEX
    token_logps = torch.log_softmax(logits.float(), dim=-1).gather(-1, labels[:, 1:][labelled][:, None])[:, 0]
    rows = labelled.nonzero()[:, 0]
    return token_logps.new_zeros(labels.shape[0]).index_add(0, rows, token_logps)


def row_mean_logits(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over labelled positions of the mean logit, and the number of such positions, of every row; both (B,)."""
    labelled = labels[:, 1:] != IGNORE_INDEX
    rows = labelled.nonzero()[:, 0]
    means = logits.detach().float().mean(-1)
    return means.new_zeros(labels.shape[0]).index_add(0, rows, means), labelled.sum(1)
