"""Losses of Dynamic Modality Scheduling: plain functions, (B, M, ...) in, one number a sample out: (B,).

Each sample's number depends on that sample alone (but for the contrastive loss, which needs others to contrast with),
so that any mean over samples is the same however they are divided into batches and processes.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def modality_weight_consistency_loss(h: Tensor, weights: Tensor) -> Tensor:
    """L_mwc = sum_m w_m ||h - h_m||^2 / d_s, with h = sum_m w_m h_m (arXiv 2506.12724).

    Args:
        h: (B, M, d_s), the unimodal representations.
        weights: (B, M), rows sum to 1.

    Returns:
        (B,).
    """
    fused = (weights[..., None] * h).sum(1, keepdim=True)  # (B, 1, d_s)
    return (weights * (fused - h).pow(2).mean(-1)).sum(1)


def unimodal_loss(logits: Tensor, labels: Tensor, modality_mask: Tensor, ignore_index: int = -100) -> Tensor:
    """L_unimodal: cross-entropy of each present modality's p_m against the bag of target tokens.

    Args:
        logits: (B, M, K).
        labels: (B, L), `ignore_index` where there is no target.
        modality_mask: (B, M).

    Returns:
        (B,), the mean over targets and present modalities; 0 where there is none.
    """
    keep = labels != ignore_index
    log_p = logits.float().log_softmax(-1)  # (B, M, K)
    targets = labels.masked_fill(~keep, 0)[:, None].expand(-1, logits.shape[1], -1)
    per_target = -log_p.gather(-1, targets) * keep[:, None]  # (B, M, L)
    per_modality = per_target.sum(-1) / keep.sum(-1, keepdim=True).clamp_min(1)
    return (per_modality * modality_mask).sum(1) / modality_mask.sum(1).clamp_min(1)


def contrastive_loss(h: Tensor, modality_mask: Tensor, temperature: float = 0.07) -> Tensor:
    """L_contrastive: symmetric InfoNCE between every pair of modalities within the batch (CLIP, Radford et al., 2021).

    Args:
        h: (B, M, d_s).
        modality_mask: (B, M); only samples that have both modalities of a pair take part.

    Returns:
        (B,), the mean over pairs of modalities and both directions; 0 for a sample that takes part in none, or alone.
    """
    unit = F.normalize(h.float(), dim=-1)
    total, own = unit.sum((1, 2)) * 0, torch.eye(len(h), dtype=torch.bool, device=h.device)
    for first in range(h.shape[1]):
        for second in range(first + 1, h.shape[1]):
            both = modality_mask[:, first].bool() & modality_mask[:, second].bool()
            logits = unit[:, first] @ unit[:, second].T / temperature
            both_ways = torch.stack([logits, logits.T]).masked_fill(~(both | own), -torch.inf)
            loss = -both_ways.log_softmax(-1).diagonal(dim1=1, dim2=2).mean(0)
            total = total + loss.where(both, 0)
    return total / math.comb(h.shape[1], 2)


def schedule_loss(weights: Tensor, target: Tensor, modality_mask: Tensor) -> Tensor:
    """L_schedule: cross-entropy of the weights against target weights.

    Args:
        weights: (B, M), rows sum to 1.
        target: (B, M), rows sum to 1, from `leave_one_out_target` or from the known severity of an injected
            corruption.

    Returns:
        (B,), 0 for a sample with fewer than two modalities.
    """
    if target.shape != weights.shape:
        raise ValueError(
            f"schedule_target must be (batch, modality) {tuple(weights.shape)}, got {tuple(target.shape)}"
        )
    per_sample = -(target * weights.clamp_min(torch.finfo(weights.dtype).tiny).log() * modality_mask).sum(-1)
    return per_sample * (modality_mask.sum(-1) >= 2)


def leave_one_out_target(losses_without: Tensor, tau: float = 1.0) -> Tensor:
    """Target weights: the more the task loss rises without a modality, the more weight it should have.

    Args:
        losses_without: (B, M), the task loss of each sample with modality m left out (no gradient flows).
        tau: temperature, > 0.

    Returns:
        (B, M): softmax(losses_without / tau).
    """
    return (losses_without.detach() / tau).softmax(-1)
